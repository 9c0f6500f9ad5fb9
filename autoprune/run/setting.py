"""From a job to everything that a search, a comparison or an application starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from autoprune import plugins
from autoprune.allocation.sensitivity import Table, TablePlan, affordable
from autoprune.costs._latency_table import LatencyTable
from autoprune.database.batches import Parts
from autoprune.database.store import LevelDatabase
from autoprune.evaluation import Ask, Tier
from autoprune.evaluator.fidelity import AUTO, Fidelity
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.executors._watched import Watched
from autoprune.files.job import Job
from autoprune.front import Base
from autoprune.protocols import EvaluatorFactory, Executor, FitnessTier, Problem, Task
from autoprune.run.constraints import Constraint
from autoprune.run.ignored import ignored
from autoprune.run.ledger import Prices
from autoprune.run.needs import Needs
from autoprune.run.worker_evaluator import make_evaluator
from autoprune.structure import Structure


@dataclass(frozen=True)
class Setting:
    """A job made ready: the searched structure, its level database, the problem without seeds, the dense base.

    `lent` is a Task that came from Python and does not travel to other processes; None where the job names it.
    `settings` are the evaluator's, with the precision that `auto` came to on this machine and the loss that it came to
    for these outputs (`fidelity` says why): workers compute in it too. `said` is what the user ought to know of it,
    `controls` are the control arms that the space can take. `whole` is what the job would search without its container,
    where its price is to be measured. `parts` are the calibration data, `samples_path` is the folder of their files,
    where they are many. `step` is that of the runtime whose latency is searched for.
    """

    job: Job
    task: Task
    lent: Task | None
    settings: Settings
    structure: Structure
    database: LevelDatabase
    database_path: Path
    problem: Problem
    base: Base
    prices: Prices
    fidelity: Fidelity
    parts: Parts
    samples_path: Path | None = None
    controls: tuple[str, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    latency: LatencyTable | None = None
    step: int = 1
    built_s: float = 0.0
    pace_s: float | None = None
    needs: Needs | None = None
    said: tuple[str, ...] = ()
    whole: Structure | None = None

    @property
    def identity(self) -> dict[str, str]:
        """What evaluations depend on beside the job: a record of other ones must not answer."""
        b, s = self.base, self.settings
        computed = {"precision": s.precision, "device": device_type(self.job, s)}
        rate = {} if s.learning_rate is None else {"learning_rate": repr(s.learning_rate)}
        grids = {} if self.step == 1 else {"step": str(self.step)}
        return {
            **self._users_code(),
            **{"structure": b.structure_fingerprint, "weights": b.weights_fingerprint, "data": b.data},
            **computed,
            **rate,
            **grids,
            "loss": self.fidelity.identity,
        }

    def _users_code(self) -> dict[str, str]:
        """A digest of the criterion and the costs that are a user's own: they may change under the same name."""
        named: dict[plugins.Folder, Iterable[str]] = {
            "criteria": [self.job.criterion.name],
            "costs": self.settings.costs,
        }
        own = [plugins.load(f, name) for f, names in named.items() for name in names if plugins.is_users(f, name)]
        digests = [plugins.source_digest(plugin) for plugin in own]
        return {"your plug-ins": " ".join(digests)} if digests else {}

    @property
    def tier(self) -> Tier:
        return self.problem.tier

    def at_tier(self, tier: FitnessTier) -> Setting:
        """The same with another fitness tier."""
        base = replace(self.base, space={**self.base.space, "tier": tier})
        return replace(self, problem=replace(self.problem, tier=tier), base=base)

    def for_search(self, job: Job) -> Setting:
        """The same for a job that differs in its search alone: sampler, options, seed."""
        settings = replace(self.settings, seed=job.search.seed)
        return replace(self, job=job, settings=settings, problem=replace(self.problem, n_trials=job.search.trials))

    def with_table(self, table: Table | None) -> Setting:
        """The same with a sensitivity table, or without one."""
        return replace(self, problem=replace(self.problem, table=table))

    def worth(self, asks: Iterable[Ask]) -> float:
        """What `asks` cost together, in full evaluations at the fitness tier: one that comes again costs nothing."""
        return self.prices.worth(asks, self.tier)

    def table_plan(self, ledger: int) -> TablePlan:
        """How the sensitivity table is measured: as the job says, or as a search of so many trials can afford."""
        asked = self.job.evaluator.sensitivity
        return affordable(self.structure, self.worth, ledger) if asked == "auto" else TablePlan(max(1, asked))

    def facts(self) -> dict[str, Any]:
        """What log.jsonl says as a run starts."""
        facts: dict[str, Any] = {"groups": len(self.structure), "trials": self.job.search.trials}
        facts |= {"database_s": round(self.built_s, 3)}
        facts |= {"memory": self.settings.memory}  # bytes of entries that are kept
        return facts | ({} if self.needs is None else {"needs": self.needs.facts(self.n_workers)})

    def notes(self, plan: TablePlan | None) -> tuple[str, ...]:
        """What a user ought to know before the search: its loss, what is special, sensitivity and latency table."""
        chosen, e = self.fidelity, self.job.evaluator
        loss = f"loss {chosen.name}: {chosen.why}" if self.job.objectives.loss == AUTO else ""
        table = plan.said() if plan is not None and e.sensitivity == "auto" else ""
        latency = "" if self.latency is None else self.latency.verdict()
        return tuple(filter(None, (loss, *ignored(self.job, self.settings), *self.said, table, latency)))

    def table_path(self, plan: TablePlan) -> Path:
        """Where the sensitivity table lies: beside the database, under what its figures depend on."""
        s = self.settings
        loss = (self.fidelity.identity, s.metric, s.direction)
        what = (*loss, s.calibration, s.precision, plan.identity, self.base.data)
        key = hashlib.sha256(repr(what).encode()).hexdigest()[:8]
        return self.database_path.with_name(f"{self.database_path.stem}-{key}.sensitivity.json")

    def evaluator_factory(self) -> Callable[[], TieredEvaluator]:
        """What builds an evaluator, here or in a worker."""
        if self.lent is not None:
            return partial(
                TieredEvaluator,
                self.lent,
                self.structure,
                self.database,
                self.settings,
                latency=self.latency,
                parts=self.parts,
            )
        return partial(
            make_evaluator,
            self.job.dump(),
            self.settings,
            self.structure,
            self.database_path,
            latency=self.latency,
            samples=self.samples_path,
        )

    def shipment(self) -> EvaluatorFactory:
        """The same for workers that share no files with this process."""
        from autoprune.evaluator.shipment import Shipment

        return Shipment.of(self.task, self.structure, self.database, self.settings, self.latency, self.parts)

    @property
    def n_workers(self) -> int:
        """Workers to start: as many as the job asks for, by itself as many as have cores and memory here."""
        part = self.job.executor
        if part.kind == "inline":
            return 1
        asked = part.workers if isinstance(part.workers, int) else None
        if asked is None and travels(plugins.load("executors", part.kind)):
            return self.job.search.window
        return part.n_workers if self.needs is None else self.needs.workers(asked, part.n_workers)

    def executor(self) -> Executor:
        """The job's executor, started; a task lent from Python is evaluated in this process unless it can travel."""
        part = self.job.executor
        make = plugins.load("executors", part.kind)
        if part.kind == "inline" or (self.lent is not None and not travels(make)):
            return Watched("inline", plugins.load("executors", "inline")(self.evaluator_factory(), part.retries))
        factory = self.shipment() if travels(make) else self.evaluator_factory()
        options = plugins.with_paths(make, self.job.executor_options)
        with plugins.calling("executors", part.kind):
            return Watched(part.kind, make(factory, self.n_workers, part.timeout_s, part.retries, **options))


def idle_words(job: Job) -> str:
    """What to say where a search cannot keep the workers busy that it is given; empty where it can."""
    part, window = job.executor, job.search.window
    if part.kind == "inline" or (part.workers == "auto" and part.kind != "local") or part.n_workers <= window:
        return ""
    return (
        f"{part.n_workers} workers, but the search asks {window} at a time (search.window), so that "
        f"{part.n_workers - window} wait while it runs; search.window: {part.n_workers} uses all of them, in a run of "
        "its own, as it is part of what a search finds"
    )


def device_type(job: Job, settings: Settings) -> str:
    """What kind of device evaluates; Ray shows its workers no other one than they asked for."""
    if settings.device == "auto" and job.executor.kind == "ray":
        return "cuda" if (job.executor.resources or {}).get("gpu") else "cpu"
    return settings.torch_device.type


def travels(make: object) -> bool:
    """Whether an executor takes everything to other machines, rather than have its workers read the job's files."""
    return bool(getattr(make, "travels", False))
