"""From a job to everything that a search, a comparison or an application starts from."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from autoprune import plugins
from autoprune.budget import Projector
from autoprune.calibration import StatisticsOnly, digest, size
from autoprune.constraints import Constraint, parse_constraints
from autoprune.costs import build_cost
from autoprune.database.store import LevelDatabase, build_database, database_key
from autoprune.errors import InputError, did_you_mean
from autoprune.evaluate import (
    COSTS,
    Settings,
    TieredEvaluator,
    make_evaluator,
    prepared_model,
    prepared_parts,
    resolved_precision,
)
from autoprune.evaluation import Ask, Tier
from autoprune.files import write_whole
from autoprune.front import Base
from autoprune.job import Job
from autoprune.latency.calibrate import fit_latency
from autoprune.latency.table import LatencyTable
from autoprune.ledger import Prices
from autoprune.precision import Precision
from autoprune.protocols import Criterion, EvaluatorFactory, Executor, FitnessTier, Problem, Task
from autoprune.recover import BATCH_SIZE
from autoprune.samples import Samples
from autoprune.space import restrict
from autoprune.structure import Structure
from autoprune.tracing.analyze import analyze
from autoprune.tracing.fingerprint import weights_fingerprint


@dataclass(frozen=True)
class Setting:
    """A job made ready: the searched structure, its level database, the problem without seeds, the dense base.

    `lent` is a Task that came from Python and does not travel to other processes; None where the job names it.
    """

    job: Job
    task: Task
    lent: Task | None
    structure: Structure
    database: LevelDatabase
    database_path: Path
    problem: Problem
    base: Base
    prices: Prices
    constraints: tuple[Constraint, ...] = ()
    latency: LatencyTable | None = None
    built_s: float = 0.0

    @property
    def identity(self) -> dict[str, str]:
        """What evaluations depend on beside the job: a record of other ones must not answer."""
        b = self.base
        return {"structure": b.structure_fingerprint, "weights": b.weights_fingerprint, "data": b.data}

    @property
    def tier(self) -> Tier:
        return self.problem.tier

    def at_tier(self, tier: FitnessTier) -> Setting:
        """The same with another fitness tier."""
        base = replace(self.base, space={**self.base.space, "tier": tier})
        return replace(self, problem=replace(self.problem, tier=tier), base=base)

    def price(self, ask: Ask) -> float:
        """What `ask` costs, in full evaluations at the fitness tier."""
        return self.prices.full(ask, self.tier)

    def worth(self, asks: Iterable[Ask]) -> float:
        """What `asks` cost together: one that comes again costs nothing."""
        return sum(map(self.price, dict.fromkeys(asks)))

    @property
    def precision(self) -> Precision:
        """What `evaluator.precision` came to on this machine: workers compute in it too, whatever theirs can."""
        found: Precision = self.base.space["precision"]
        return found

    @property
    def table_path(self) -> Path:
        """Where the sensitivity table lies: beside the database, under what its figures depend on."""
        s = Settings.of(self.job)
        what = (s.loss, s.direction, s.calibration, s.precision, self.job.evaluator.sensitivity, self.base.data)
        key = hashlib.sha256(repr(what).encode()).hexdigest()[:8]
        return self.database_path.with_name(f"{self.database_path.stem}-{key}.sensitivity.json")

    def evaluator_factory(self) -> EvaluatorFactory:
        """What builds an evaluator, here or in a worker."""
        if self.lent is not None:
            parts = (self.lent, self.structure, self.database, self._settings)
            return partial(TieredEvaluator, *parts, latency=self.latency)
        part = self.job.evaluator.model_copy(update={"precision": self.precision})
        job = self.job.model_copy(update={"evaluator": part})
        return partial(make_evaluator, job.dump(), self.structure, self.database_path, self.latency)

    def shipment(self) -> EvaluatorFactory:
        """The same for workers that share no files with this process."""
        from autoprune.shipment import Shipment

        return Shipment.of(self.task, self.structure, self.database, self._settings, self.latency)

    @property
    def _settings(self) -> Settings:
        return replace(Settings.of(self.job), precision=self.precision)

    def executor(self) -> Executor:
        """The job's executor, started; a task lent from Python is evaluated in this process unless it can travel."""
        part = self.job.executor
        make = plugins.load("executors", part.kind)
        if part.kind == "inline" or (self.lent is not None and not travels(make)):
            inline: Executor = plugins.load("executors", "inline")(self.evaluator_factory(), part.retries)
            return inline
        window = self.job.search.window
        workers = window if part.workers == "auto" and travels(make) else part.n_workers
        if workers > window:
            warnings.warn(f"{workers} workers, but search.window keeps {window} asks in flight", stacklevel=2)
            workers = window
        factory = self.shipment() if travels(make) else self.evaluator_factory()
        executor: Executor = make(factory, workers, part.timeout_s, part.retries, **self.job.executor_options)
        return executor


def travels(make: object) -> bool:
    """Whether an executor takes everything to other machines, rather than have its workers read the job's files."""
    return bool(getattr(make, "travels", False))


def check_executor(job: Job) -> None:
    """What an executor can say before anything is prepared: whether its cluster is there and has room.

    Raises:
        InputError: it is not, or has not.
    """
    make = plugins.load("executors", job.executor.kind)
    if hasattr(make, "check"):
        make.check(**job.executor_options)


def prepare(job: Job, folder: Path, task: Task | None = None, shared: Path | None = None) -> Setting:
    """Analyse the model, build or open the level database, and state the problem.

    The database lies in `folder`, or in `shared` where several runs of one model use it.

    Raises:
        InputError: the model cannot be analysed, the space or criterion does not fit it, or the budget is out of reach.
    """
    lent, task = task, task or job.build_task()
    settings = Settings.of(job)
    if settings.direction is not None and settings.loss not in task.directions:
        hint = did_you_mean(settings.loss, task.directions)
        raise InputError(f"objectives.loss.metric: the task has no metric {settings.loss!r}; {hint}")
    constraints = parse_constraints(job.constraints, task.directions)
    model = prepared_model(task, settings.torch_device)
    whole = analyze(task.build(), task.example_inputs(), seed=job.search.seed)
    structure = restrict(whole, job.search_space())
    made = (shared or folder).resolve() / "database"  # workers may stand in other folders
    latency = _latency(job, structure, model, task, made) if "latency" in settings.costs else None
    problem = _problem(job, structure, latency)
    parts = prepared_parts(task, settings, model)
    seen = StatisticsOnly(task, parts.statistics)
    path = made / f"{database_key(model, structure, seen, job.criterion)}.safetensors"
    built_s = 0.0
    if not path.exists():
        started = time.perf_counter()
        build_database(model, structure, seen, load_criterion(job.criterion)).save(path)
        built_s = time.perf_counter() - started
    database = LevelDatabase.open(path)
    samples = Samples(task, model, parts, settings.torch_device, settings.batch_size, settings.validation)
    base = Base(
        structure_fingerprint=whole.fingerprint,
        weights_fingerprint=weights_fingerprint(model),
        model=_model_name(job, model),
        inputs=tuple({"shape": list(x.shape), "dtype": str(x.dtype).split(".")[1]} for x in task.example_inputs()),
        costs={name: problem.costs[name].dense for name in COSTS},
        metrics={},
        groups=structure.groups,
        space={
            "granularity": job.space.granularity,
            "criterion": job.criterion,
            "multiple_of": job.space.multiple_of,
            "calibration": parts.total,
            "tier": problem.tier,
            "finetune_steps": job.evaluator.finetune_steps,
            "precision": resolved_precision(task, model, structure, settings, samples)[0],
        },
        data=digest([parts.statistics, *parts.fitness, *parts.heldback]),
        directions=dict(task.directions),
    )
    problem = replace(problem, scores=database.scores(structure))
    fitness, heldback = (sum(size(b) for b in part) for part in (parts.fitness, parts.heldback))
    lesson = job.evaluator.finetune_steps * BATCH_SIZE
    splits = (size(parts.statistics), fitness, heldback, settings.validation)
    prices = Prices(*splits, lesson, settings.metrics_on_fitness, settings.direction is not None)
    given = (job, task, lent, structure, database, path, problem, base, prices, constraints, latency, built_s)
    return Setting(*given)


def load_criterion(name: str) -> Criterion:
    """The criterion called `name`; InputError where "module:attribute" names something else."""
    criterion = plugins.load("criteria", name)
    if not isinstance(criterion, type) or not hasattr(criterion, "__call__"):  # noqa: B004  # of its instances
        raise InputError(f"criterion {name!r} must be a class whose instances can be called, not {criterion!r:.80}")
    made: Criterion = criterion()
    return made


def make_folder(folder: Path) -> None:
    """The run folder, made where there is none; InputError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --out {folder}: {error.strerror}") from None


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make the run folder for what follows; where that is refused, no folder stays that is new and holds no file.

    What was built until then (level database, latency table) took its time and stays: the corrected call uses it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    try:
        yield
    except BaseException:
        inside = sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True) if made else []
        for path in (*inside, *made):  # from within outwards
            with suppress(OSError):  # it holds something
                path.rmdir()
        raise


def write_event(folder: Path, event: str, facts: Mapping[str, Any]) -> None:
    """Append one line to the run's log.jsonl."""
    line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}, default=str)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(line + "\n")


def _latency(job: Job, structure: Structure, model: nn.Module, task: Task, folder: Path) -> LatencyTable:
    """The latency table of the job's runtime, from its file or measured now."""
    part = job.latency
    name = f"latency-{structure.fingerprint[7:19]}-{part.runtime}-{part.batch_size}-{part.models}.json"
    if (folder / name).exists():
        return LatencyTable.from_json((folder / name).read_text(encoding="utf-8"))
    inputs = task.example_inputs()
    table = fit_latency(model, inputs, structure, part.runtime, part.batch_size, part.models, job.search.seed)
    write_whole(folder / name, table.to_json())
    return table


def _problem(job: Job, structure: Structure, latency: LatencyTable | None) -> Problem:
    costs = {name: build_cost(name, structure, latency) for name in Settings.of(job).costs}
    budget = job.budget.plain()
    Projector(structure, costs).check({budget.cost: budget.low, **budget.limits})
    tier = "refit" if job.evaluator.fitness == "auto" else job.evaluator.fitness
    if tier == "tune" and job.evaluator.finetune_steps == 0:
        raise InputError("evaluator.fitness: tune needs evaluator.finetune_steps of 1 or more, not 0")
    parts = (job.objectives.costs, job.search.trials, tier)
    return Problem(structure, {}, costs, budget, *parts, logarithmic=job.objectives.logarithmic)


def _model_name(job: Job, model: object) -> str:
    return str(job.task.args.get("model", f"{job.task.target}:{type(model).__name__}"))
