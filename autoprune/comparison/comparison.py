"""The verb `compare`: strategies and samplers at the same budgets, seeds and ledgers, side by side, on validation."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from autoprune.allocation.sensitivity import TablePlan, table_cost
from autoprune.comparison.arm import Arm, ArmId, arm_key, closed_form_arm, searched_arm
from autoprune.comparison.checks import (
    asked_names,
    at_budgets,
    at_seed,
    at_tier,
    check_fits,
    check_reach,
    checked_budgets,
    checked_names,
    checked_seeds,
    is_closed_form,
    options_of,
    same_job,
)
from autoprune.comparison.document import csv_of, document_of
from autoprune.errors import NoPointError
from autoprune.evaluation import Ask, Evaluation, Labelled
from autoprune.executors._lazy import Lazy
from autoprune.files.job import Job
from autoprune.files.whole import write_whole
from autoprune.policy import Policy
from autoprune.protocols import Problem, Step, Task, finished, relayed
from autoprune.record.folder import make_folder, new_folder
from autoprune.record.lock import locked
from autoprune.record.record import Record, Stage
from autoprune.run.after import MAX_POINTS, dense_ask
from autoprune.run.before import chosen_tier, measured_table, usable
from autoprune.run.folder_checks import recorded_identity
from autoprune.run.loop import evaluate_all
from autoprune.run.pace import Pace
from autoprune.run.prepare import check_executor, preparing
from autoprune.run.run import Run
from autoprune.run.setting import Setting
from autoprune.run.timed import LATENCY, latencies
from autoprune.samplers import needs
from autoprune.strategies import load_strategy, uses_table

N_CURVE = MAX_POINTS
"""Targets over the range at which a closed-form strategy is scored: as many as a search exports points at most."""
SHARED, ARM, OLD_ARM = "shared", "arm.json", "cell.json"


def compare(
    job: Job | str | Path | Mapping[str, Any],
    strategies: str | Sequence[str] | None = None,
    budgets: float | Sequence[float] | None = None,
    seeds: int | Sequence[int] = 3,
    out: Path | None = None,
    task: Task | None = None,
) -> dict[str, Any]:
    """Compare to the end; returns {"rows": [...], "summary": ..., "verdicts": ..., "reference": ...}.

    `strategies` are by default the job's control arms and evolution; a single name or budget needs no list.
    Writes compare.csv (the rows), compare.json (all of it) and compare.html. See `Comparison`.

    Raises:
        InputError: before anything is searched: an unknown name, a budget out of reach, a list that is empty, a sampler
            that does not fit the problem, or a folder with a comparison of another job.
    """
    return Comparison(job, strategies, budgets, seeds, out, task).finish().document


class Comparison:
    """A comparison under way. Iterating drives it to the end; finished arms are kept, so that it goes on after a kill.

    An arm is one strategy at one seed. A closed-form strategy ("module:function" for a user's own) is one policy a
    budget; a sampler ("module:Class") is one whole search of the job's trials, without the control arms' points. All
    share one level database, one sensitivity table and one fitness tier. `seeds` is a number of seeds, from the job's
    own on, or a list of them. `stage` says which arm of how many is under way, `done` counts evaluations of a `total`
    that is a guess until the last arm, `kept` the arms that were found finished; `note` is about the tier.
    `controls` are the control arms among what is compared; the last is the one to beat.
    """

    def __init__(
        self,
        job: Job | str | Path | Mapping[str, Any],
        strategies: str | Sequence[str] | None = None,
        budgets: float | Sequence[float] | None = None,
        seeds: int | Sequence[int] = 3,
        out: Path | None = None,
        task: Task | None = None,
    ) -> None:
        self._given = job = Job.of(job, task)
        self.strategies = checked_names(asked_names(strategies, job))
        self.budgets = checked_budgets(job.budget.plain().at if budgets is None else budgets)
        self.seeds = checked_seeds(seeds, job.search.seed)
        self.path = Path(out) if out is not None else Path("runs") / f"{job.name}-compare"
        self._job, self._task, self._pace = job, task, Pace()
        self._made: Setting | None = None
        self.arms: dict[tuple[str, int], Arm] = {}
        self._document: dict[str, Any] | None = None
        self._tabled: TablePlan | None = None  # how the sensitivity table was measured, where an arm needs one
        self.stage, self.note, self.done, self.total, self.kept, self._begun = "prepare", "", 0, 0, 0, 0

    def preparing(self) -> Iterator[Step]:
        """Make it ready, step by step; nothing where that has happened.

        Raises:
            InputError: see `compare`.
        """
        if self._made is not None:
            return
        with new_folder(self.path), locked(self.path):
            self._given = job = same_job(self.path, self._given)
            self._job = at_budgets(job, self.budgets)
            check_executor(job)
            made = yield from self._checked(job)
            write_whole(self.path / "job.yaml", job.dump())
        self._made = made

    @property
    def _setting(self) -> Setting:
        for _ in self.preparing():
            pass
        assert self._made is not None
        return self._made

    @property
    def controls(self) -> tuple[str, ...]:
        """The control arms among what is compared; the last is the one to beat."""
        usable_ones = usable(self._given.compare.controls, self._setting.structure)
        return tuple(name for name in usable_ones if name in self.strategies)

    @property
    def counted(self) -> str:
        """How far it is, in words."""
        return self._pace.counted if self._made is None else f"{self.done} of about {self.total} evaluations"

    @property
    def left_s(self) -> float | None:
        """About how long the preparation and what comes after it take; None once that is done."""
        return self._pace.left_s if self._made is None else None

    def __iter__(self) -> Iterator[Evaluation]:
        """Evaluations as they are told, arm after arm."""
        for _ in self.preparing():
            pass
        self.arms, self.done, self.total, self.kept, self._begun, self._document = {}, 0, 0, 0, 0, None
        with locked(self.path):
            for evaluation in self._stages():
                self.done += 1
                self.total = max(self.total, self.done)
                yield evaluation
            self._publish()

    def finish(self) -> Comparison:
        """Drive the comparison to its end."""
        for _ in self:
            pass
        return self

    @property
    def document(self) -> dict[str, Any]:
        """What compare.json holds; drives the comparison to its end if that has not happened."""
        if self._document is None:
            self.finish()
        assert self._document is not None
        return self._document

    def _told(self) -> dict[str, Any]:
        """The rows, verdicts and fronts of all arms, which are there."""
        ordered = {(name, seed): self.arms[name, seed] for name in self.strategies for seed in self.seeds}
        setting = self._setting
        table = None if self._tabled is None else table_cost(setting.table_path(self._tabled))
        directions = setting.base.directions
        problem, controls = setting.problem, self.controls
        found = document_of(ordered, self.budgets, controls, problem, directions=directions, table=table)
        return {**found, "note": self.note}

    @property
    def n_arms(self) -> int:
        """Arms of the comparison."""
        n_closed = len(self._closed_forms)
        return n_closed * len(self._closed_seeds) + (len(self.strategies) - n_closed) * len(self.seeds)

    @property
    def _closed_forms(self) -> tuple[str, ...]:
        return tuple(name for name in self.strategies if is_closed_form(name))

    @property
    def _closed_seeds(self) -> tuple[int, ...]:
        """The seeds at which closed forms are measured: only a fine-tune depends on the seed."""
        return self.seeds if self._setting.tier == "tune" else self.seeds[:1]

    def _checked(self, job: Job) -> Generator[Step, None, Setting]:
        """The problem of all arms; InputError where a budget, a strategy or a sampler does not fit it."""
        shared = self.path / SHARED
        first = at_seed(self._job, self.seeds[0])
        recorded = recorded_identity(first, shared)
        setting = yield from relayed(preparing(first, shared, self._task, recorded=recorded), self._noted)
        check_reach(setting.problem, self.budgets)
        for name in self.strategies:
            check_fits(name, setting.problem, options_of(job, name))
        return setting

    def _noted(self, step: Step) -> Step:
        """A step of the preparation, under its name."""
        self._pace.take(step)
        self.stage = step.stage
        return step

    def _stages(self) -> Iterator[Evaluation]:
        yield from self._open()
        for seed in self._closed_seeds:
            yield from self._measure(seed)
        for seed in self.seeds:
            for name in self.strategies:
                if not is_closed_form(name):
                    yield from self._search(name, seed)

    def _open(self) -> Iterator[Evaluation]:
        """What all arms share: the sensitivity table, where any of them needs it, and the fitness tier."""
        setting, self.stage = self._setting, "shared by all arms"
        objectives, place = setting.problem.objectives, self.path / SHARED
        with (
            Record(place, setting.structure, objectives, setting.tier, setting.identity) as record,
            closing(Lazy(setting.executor)) as executor,
        ):

            def evaluate(stage: Stage, asks: Labelled) -> Iterator[Evaluation]:
                self.total = self.done + len(asks)
                return evaluate_all(record, executor, asks, stage)

            if any(self._needs_table(name) for name in self.strategies):
                self._tabled = plan = setting.table_plan(record.horizon(setting.job.search.trials))
                place, tabled = setting.table_path(plan), partial(evaluate, "table")
                tabling = measured_table(setting.structure, place, plan, tabled)
                setting = setting.with_table((yield from tabling))
            if self._job.evaluator.leaves_tier:
                seed = setting.job.search.seed
                found = yield from chosen_tier(setting.problem, seed, partial(evaluate, "proxy"))
                setting, self.note = setting.at_tier(found.tier), found.verdict
        self._made, self._job = setting, at_tier(self._job, setting.tier)

    def _needs_table(self, name: str) -> bool:
        if is_closed_form(name):
            return uses_table(name)
        return self._job.evaluator.has_table and needs(name, options_of(self._job, name)).table

    def _measure(self, seed: int) -> Iterator[Evaluation]:
        """The arms of the closed-form strategies at `seed`."""
        setting = self._setting.for_search(at_seed(self._job, seed))
        place, key = self.path / f"closed-form-seed{seed}", arm_key(setting.job, setting.identity)
        make_folder(place)
        with (
            Record(place, setting.structure, setting.problem.objectives, setting.tier, setting.identity) as record,
            closing(Lazy(setting.executor)) as executor,
        ):
            for name in self._closed_forms:
                self._begin(name, seed)
                file = place / f"{self._word(name)}.json"
                arm = self._kept(file, key)
                if arm is None:
                    asks = closed_form_asks(setting.problem, name)
                    self._expect(len(asks))
                    done: list[Evaluation] = []
                    for evaluation in evaluate_all(record, executor, asks, "final"):
                        done.append(evaluation)
                        yield evaluation
                    which = ArmId(name, seed, key)
                    arm = closed_form_arm(which, done, setting.problem, setting.constraints, self._timed)
                    arm.save(file)
                for at in self.seeds if len(self._closed_seeds) == 1 else (seed,):
                    self.arms[name, at] = replace(arm, seed=at)

    def _search(self, name: str, seed: int) -> Iterator[Evaluation]:
        """The arm of a sampler at `seed`: a whole search in a folder of its own."""
        self._begin(name, seed)
        setting = self._setting.for_search(at_seed(self._job, seed, name))
        place, key = self.path / f"{self._word(name)}-seed{seed}", arm_key(setting.job, setting.identity)
        arm = self._kept(place / (ARM if (place / ARM).exists() else OLD_ARM), key)
        if arm is None:
            self._expect(setting.job.search.trials)
            run = Run(setting.job, place, alone=setting)
            try:
                yield from run
                points = {point.policy: point.costs.get(LATENCY) for point in run.front}
            except NoPointError:  # the other arms stand, and this one says that there is none
                points = {}
            with Record(place, setting.structure, setting.problem.objectives, setting.tier, setting.identity) as record:
                which = ArmId(name, seed, key)
                arm = searched_arm(which, record.evaluations, points, setting.problem, setting.prices)
            arm.save(place / ARM)
        self.arms[name, seed] = arm

    def _timed(self, policies: list[Policy]) -> Mapping[Policy, Mapping[str, float]]:
        """Their measured latencies, where the job has a latency."""
        return finished(latencies(self._setting, policies))

    def _begin(self, name: str, seed: int) -> None:
        self._begun += 1
        self.stage = f"arm {self._begun} of {self.n_arms}: {name}, seed {seed}"

    def _expect(self, n: int) -> None:
        """Guess the total: `n` evaluations in this arm, the job's trials in each search that is still to come."""
        searches = min(self.n_arms - self._begun, (len(self.strategies) - len(self._closed_forms)) * len(self.seeds))
        self.total = self.done + n + searches * self._job.search.trials

    def _kept(self, file: Path, key: str) -> Arm | None:
        arm = Arm.load(file, key)
        self.kept += arm is not None
        return arm

    def _word(self, name: str) -> str:
        """A file name for a strategy at these budgets."""
        return f"{re.sub(r'[^A-Za-z0-9_.-]', '.', name)}-at{'-'.join(f'{b:g}' for b in self.budgets)}"

    def _publish(self) -> None:
        from autoprune.report.comparison import build_comparison

        self._document = document = self._told()
        write_whole(self.path / "compare.csv", csv_of(document["rows"]))
        write_whole(self.path / "compare.json", json.dumps(document, indent=1))
        build_comparison(self.path, document)
        self.stage = "done"


def closed_form_asks(problem: Problem, name: str) -> Labelled:
    """The strategy at the asked budgets, the dense model, and the strategy along the range, all on validation."""
    strategy = load_strategy(name, problem.structure)
    budget = problem.budget
    targets = [*budget.at, *(float(t) for t in np.linspace(budget.low, budget.high, N_CURVE))]
    asks = [(f"{name}@{t:.6g}", Ask(strategy(problem, t), problem.tier, split="validation")) for t in targets]
    dense = ("dense", dense_ask(problem.structure))
    return [*asks[: len(budget.at)], dense, *asks[len(budget.at) :]]
