"""From a job to its Setting: analyse, build or open the level database, state the problem."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from autoprune import plugins
from autoprune.allocation.budget import Projector
from autoprune.allocation.sensitivity import TablePlan, affordable
from autoprune.costs import build_cost
from autoprune.costs._latency_table import LatencyTable
from autoprune.criteria import build_criterion, criterion_identity
from autoprune.database.batches import Parts, StatisticsOnly
from autoprune.database.build import STATISTICS
from autoprune.database.makers import Across, Beside, Here, Maker
from autoprune.database.on_disk import building
from autoprune.database.store import LevelDatabase, database_key
from autoprune.database.zeros import said_of
from autoprune.deploy import check_model, joined, searched
from autoprune.errors import InputError, did_you_mean
from autoprune.evaluation import Tier
from autoprune.evaluator.checks import check_data
from autoprune.evaluator.fidelity import AUTO
from autoprune.evaluator.keep_best import scorings
from autoprune.evaluator.material import BATCH_SIZE
from autoprune.evaluator.prepared import drawn_once, prepared_model, resolved_fidelity, resolved_precision
from autoprune.evaluator.samples import Samples
from autoprune.evaluator.settings import COSTS, Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.files.job import Job
from autoprune.files.machine import free_memory, own_memory
from autoprune.front import Base
from autoprune.protocols import Criterion, Problem, Step, Task, check_directions, finished
from autoprune.run.before import needs_table, usable
from autoprune.run.constraints import parse_constraints
from autoprune.run.kept_analysis import Kept, kept_analysis
from autoprune.run.ledger import Prices
from autoprune.run.needs import Needs, check_room, database_bytes, drop_work, entry_bytes, with_grams
from autoprune.run.plan import Plan, expected
from autoprune.run.rehearsal import rehearse_executor
from autoprune.run.setting import Setting, idle_words
from autoprune.run.timed import LATENCY, clocked_of, latency_table, runtime_step, step_words
from autoprune.run.worker_rehearsal import rehearsed
from autoprune.structure import Structure
from autoprune.tracing.inputs import described
from autoprune.tracing.one_thread import one_thread
from autoprune.tracing.slim import named_tensors

DROPS_A_SECOND = 2e10
"""Multiplications of a drop pass, about, on one core; its own pace corrects that."""


def check_executor(job: Job) -> None:
    """What an executor can say before anything is prepared: its options, whether its cluster is there and has room.

    Raises:
        InputError: an option that it does not take, or no cluster, or no room in it.
    """
    make = plugins.load("executors", job.executor.kind)
    given = 2 if job.executor.kind == "inline" else 4  # the factory and what every executor is told
    plugins.check_options(make, job.executor_options, given, "executor.options")
    rehearse_executor(job.executor.kind, make, given, job.executor_options)
    if hasattr(make, "check"):
        make.check(**plugins.with_paths(make, job.executor_options))


def prepare(
    job: Job,
    folder: Path,
    task: Task | None = None,
    shared: Path | None = None,
    recorded: Mapping[str, str] | None = None,
) -> Setting:
    """`preparing` to its end."""
    return finished(preparing(job, folder, task, shared, recorded))


def preparing(
    job: Job,
    folder: Path,
    task: Task | None = None,
    shared: Path | None = None,
    recorded: Mapping[str, str] | None = None,
    priced: bool = False,
) -> Generator[Step, None, Setting]:
    """Analyse the model, build or open the level database, and state the problem; a step before each part of it.

    What each stage comes to is on disk before the next one begins, so that a call that is killed is no loss.

    The database lies in `folder`, or in `shared` where several runs of one model use it. `recorded` is the identity of
    a record to go on with: what this machine would choose otherwise is what it was. With `priced` what the job's
    container leaves out is made ready too.

    Raises:
        InputError: the model cannot be analysed, the space or criterion does not fit it, the budget is out of reach,
            or there is too little memory.
    """
    with one_thread():
        return (yield from _preparing(job, folder, task, shared, recorded, priced))


def _preparing(
    job: Job, folder: Path, task: Task | None, shared: Path | None, recorded: Mapping[str, str] | None, priced: bool
) -> Generator[Step, None, Setting]:
    lent, task = task, task or job.build_task()
    settings = with_direction(as_recorded(settings_of(job), recorded or {}, job.executor.kind), task)
    criterion = build_criterion(job.criterion_named, job.space.kinds)
    constraints = parse_constraints(job.constraints, task.directions)
    model = _fit_model(job, task, settings)
    place = (shared or folder).resolve() / "database"  # workers may stand in other folders
    yield Step("analysis")
    kept = kept_analysis(task.build(), task.example_inputs(), job.space.kinds, place)
    step = runtime_step(job, settings.torch_device, recorded)
    structure, whole, levelled = _spaces(job, kept.analysis.structure, step, priced)
    check_room(with_grams(levelled, criterion), task.example_inputs(), settings)
    timing = latency_table(job, structure, model, task, place, bool(recorded))
    latency = (yield from timing) if LATENCY in settings.costs else None
    problem = _problem(job, structure, latency)
    yield Step("data")
    parts, data, samples_path = drawn_once(task, settings, model, place)
    samples = Samples(task, model, parts, settings.torch_device, settings.batch_size, settings.validation)
    fidelity = resolved_fidelity(task, model, settings, samples)
    said, pace_s = _looked_at(task, model, settings, samples)
    controls, prices = usable(job.compare.controls, structure), _prices(parts, settings)
    ahead_s = _ahead_s(job, problem, prices, pace_s, controls)
    kept.keep()
    seen = StatisticsOnly(task, parts.statistics, samples.batch_size)
    path, built_s = yield from _built(job, model, levelled, seen, criterion, place, ahead_s, kept.weights)
    database = LevelDatabase.open(path, settings.memory)
    precision, _ = resolved_precision(task, model, structure, settings, samples, fidelity)
    settings = replace(settings, loss=fidelity.name, classes=fidelity.classes, precision=precision)
    made_here = partial(TieredEvaluator, task, structure, database, replace(settings, costs=()), model, parts=parts)
    settings, worker = yield from rehearsed(job, settings, f"{data} {fidelity.identity}", path, made_here, ahead_s)
    named = {} if lent is not None else job.plain()["task"]
    base = _base(job, task, named, model, kept, problem, _space(job, settings, parts.total, problem.tier), data)
    return Setting(
        job=job,
        task=task,
        lent=lent,
        settings=settings,
        structure=structure,
        database=database,
        database_path=path,
        problem=replace(problem, scores=database.scores(structure)),
        base=base,
        prices=prices,
        constraints=constraints,
        controls=controls,
        latency=latency,
        step=step,
        built_s=built_s,
        fidelity=fidelity,
        parts=parts,
        samples_path=samples_path,
        pace_s=pace_s,
        needs=_needs(levelled, settings, worker),
        said=tuple(
            filter(
                None,
                [kept.analysis.said, *said, *database.said(), said_of(model), step_words(job, step), idle_words(job)],
            )
        ),
        whole=whole,
    )


def _fit_model(job: Job, task: Task, settings: Settings) -> nn.Module:
    """The dense model; what its container or this machine's cores refuse is told before minutes of work."""
    clocked_of(job)
    model = prepared_model(task, settings.torch_device)
    check_model(model, job.deploy)
    return model


def _looked_at(task: Task, model: nn.Module, settings: Settings, samples: Samples) -> tuple[tuple[str, ...], float]:
    """What is to be said of the data, and the seconds that a sample of validation took."""
    started = time.perf_counter()
    said = check_data(task, model, settings, samples)
    return tuple(said), (time.perf_counter() - started) / settings.validation


def _spaces(job: Job, found: Structure, step: int, priced: bool) -> tuple[Structure, Structure | None, Structure]:
    """What is searched, what would be without the job's container where its price is to be measured, and both in one.

    One level database serves the container and what it is compared with.
    """
    structure = searched(found, job.search_space(), job.deploy, step)
    if not priced or job.deploy is None:
        return structure, None, structure
    whole = searched(found, job.search_space(), step=step)
    both = joined(structure, whole)
    return (structure, None, structure) if both is None else (structure, whole, both)


def _needs(structure: Structure, settings: Settings, worker: int | None) -> Needs:
    """What the search will need; InputError where not even one worker fits."""
    mapped = min(settings.memory, entry_bytes(structure))
    needs = Needs(own_memory(), worker, mapped, database_bytes(structure), free_memory())
    needs.check("lower evaluator.calibration, evaluator.validation or evaluator.finetune_steps")
    return needs


def _ahead_s(job: Job, problem: Problem, prices: Prices, pace_s: float, controls: Iterable[str]) -> float:
    """About what the evaluations of a search take."""
    arms = tuple(controls)
    plan = Plan(prices, pace_s)
    asked, tier = job.evaluator.sensitivity, problem.tier
    price = partial(prices.worth, tier=tier)
    table = affordable(problem.structure, price, job.search.trials) if asked == "auto" else TablePlan(max(1, asked))
    plan.guess(expected(job, problem, prices, len(arms), table if needs_table(job, arms) else None))
    return plan.left_s(job.executor.n_workers if job.executor.kind != "inline" else 1) or 0.0


def with_direction(settings: Settings, task: Task) -> Settings:
    """The settings with the task's direction of the metric that is searched for.

    Raises:
        InputError: the task has no such metric, or a job and its task say two directions.
    """
    said = check_directions(task.directions)
    if settings.metric is None:
        return settings
    if settings.metric not in said:
        hint = did_you_mean(settings.metric, said)
        raise InputError(f"objectives.loss.metric: the task has no metric {settings.metric!r}; {hint}")
    way = said[settings.metric]
    if settings.direction not in (None, way):
        raise InputError(
            f"objectives.loss.direction is {settings.direction}, but the task says {way} of its metric "
            f"{settings.metric!r}; leave it out, or mend the task's directions"
        )
    return replace(settings, direction=way)


def _built(
    job: Job,
    model: nn.Module,
    structure: Structure,
    seen: StatisticsOnly,
    criterion: Criterion,
    place: Path,
    ahead_s: float,
    weights: str,
) -> Generator[Step, None, tuple[Path, float]]:
    """The level database in `place`, built where it is not there yet: its file, and the seconds that it took."""
    identity = criterion_identity(job.criterion_named)
    path = place / f"{database_key(weights, structure, seen, identity)}.safetensors"
    if path.exists():
        return path, 0.0
    started = time.perf_counter()
    drops_s = drop_work(with_grams(structure, criterion)) / DROPS_A_SECOND / max(1, job.executor.n_workers)
    for step in building(path, model, structure, seen, criterion, _maker(job)):
        yield replace(step, ahead_s=ahead_s + (drops_s if step.stage == STATISTICS else 0.0))
    return path, time.perf_counter() - started


def _maker(job: Job) -> Maker:
    """Who makes the levels: the executor's cluster, this machine's GPU, or as many processes as evaluate."""
    executor, settings = plugins.load("executors", job.executor.kind), settings_of(job)
    if hasattr(executor, "each"):
        each = partial(executor.each, **plugins.with_paths(executor, job.executor_options))
        return Across(each, settings.find_device)
    if settings.torch_device.type == "cuda":
        return Here(settings.torch_device)
    named = {"name": job.criterion.name, "options": job.options("criterion")}
    return Beside(named, job.executor.n_workers if job.executor.kind == "local" else 1)


def _base(
    job: Job,
    task: Task,
    named: Mapping[str, Any],
    model: nn.Module,
    kept: Kept,
    problem: Problem,
    space: Mapping[str, Any],
    data: str,
) -> Base:
    """The dense model as a policy file identifies it; `named` is its task's section of the job, if it has one."""
    return Base(
        structure_fingerprint=kept.analysis.structure.fingerprint,
        weights_fingerprint=kept.weights,
        model=_model_name(job, model),
        inputs=described(task.example_inputs()),
        costs={name: cost.dense for name, cost in problem.costs.items() if name != "latency"},
        metrics={},
        groups=problem.structure.groups,
        space=space,
        data=data,
        directions=dict(task.directions),
        shapes={name: tuple(t.shape) for name, t in named_tensors(model).items()},
        task=named,
    )


def _space(job: Job, settings: Settings, calibration: int, tier: Tier) -> dict[str, Any]:
    """What policy.json says of the space and of how the search evaluated."""
    return {
        "granularity": job.space.granularity,
        "criterion": job.criterion_named,
        "multiple_of": job.space.multiple_of,
        "calibration": calibration,
        "tier": tier,
        "finetune_steps": settings.finetune_steps,
        "precision": settings.precision,
        "repair": settings.repair,
        "loss": settings.loss,
        "validation": settings.validation,
        **({} if settings.metric is None else {"metric": settings.metric}),
    }


def _prices(parts: Parts, settings: Settings) -> Prices:
    """What asks cost on these samples."""
    return Prices(
        statistics=parts.statistics.samples if settings.repair != "none" else 0,
        fitness=parts.fitness.samples,
        heldback=parts.heldback.samples,
        validation=settings.validation,
        lesson=settings.finetune_steps * BATCH_SIZE,
        watched=settings.metrics_on_fitness,
        by_metric=settings.metric is not None,
        scorings=scorings(settings.finetune_steps),
    )


def as_recorded(settings: Settings, recorded: Mapping[str, str], executor: str) -> Settings:
    """The settings with the precision, device and peak rate that a record was evaluated with, where they leave it open.

    Raises:
        InputError: there is no such device here.
    """
    rate = recorded.get("learning_rate")
    if settings.precision == "auto" and recorded.get("precision") in ("fp32", "bf16"):
        settings = replace(settings, precision="fp32" if recorded["precision"] == "fp32" else "bf16")
    if rate is not None:
        settings = replace(settings, learning_rate=float(rate))
    if settings.device != "auto" or executor == "ray":
        return settings
    device = recorded.get("device") or settings.torch_device.type
    try:
        replace(settings, device=device).torch_device  # noqa: B018
    except InputError:
        raise InputError(
            f"the record was evaluated on {device}, which is not to be had here, and one record holds one kind of "
            "device; go on where it was begun, choose another --out or start anew with --fresh"
        ) from None
    return replace(settings, device=device)


def settings_of(job: Job) -> Settings:
    """What an evaluator is told of a job: the door at which configuration stops."""
    e, loss = job.evaluator, job.objectives.loss
    metric, direction = (None, None) if isinstance(loss, str) else (loss.metric, loss.direction)
    costs = tuple(dict.fromkeys([*COSTS, *job.space.counted, *job.objectives.costs, *job.budget.plain().limits]))
    return Settings(
        loss=loss if isinstance(loss, str) else AUTO,
        metric=metric,
        direction=direction,
        calibration=e.calibration,
        validation=e.validation,
        finetune_steps=e.finetune_steps,
        costs=costs,
        seed=job.search.seed,
        device=e.device,
        precision=e.precision,
        metrics_on_fitness=bool(job.constraints),
        memory=e.memory_bytes,
        repair=e.repair,
    )


def _problem(job: Job, structure: Structure, latency: LatencyTable | None) -> Problem:
    costs = {name: build_cost(name, structure, latency) for name in settings_of(job).costs}
    budget = job.budget.plain()
    Projector(structure, costs).check({budget.cost: budget.low, **budget.limits})
    tier = "refit" if job.evaluator.fitness == "auto" else job.evaluator.fitness
    if tier == "tune" and job.evaluator.finetune_steps == 0:
        raise InputError("evaluator.fitness: tune needs evaluator.finetune_steps of 1 or more, not 0")
    return Problem(
        structure,
        {},
        costs,
        budget,
        objectives=job.objectives.costs,
        n_trials=job.search.trials,
        tier=tier,
        logarithmic=job.objectives.logarithmic,
    )


def _model_name(job: Job, model: object) -> str:
    return str(job.task.args.get("model", f"{job.task.target}:{type(model).__name__}"))
