"""The verb `search`: control arms, the search loop, finalists, the exported front. Everything finished is on disk."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from autoprune.allocation import sensitivity
from autoprune.errors import OutOfTimeError
from autoprune.evaluation import Evaluation, Labelled
from autoprune.files.job import Job
from autoprune.files.whole import write_whole
from autoprune.front import Front
from autoprune.policy import Policy
from autoprune.protocols import Executor, Step, Task, WorkerState, finished, relayed
from autoprune.record.folder import write_event
from autoprune.record.mirror import Mirror
from autoprune.record.record import Record, Stage
from autoprune.record.storage import find_home, load_study
from autoprune.run import price
from autoprune.run.before import chosen_tier, measured_table, needs_table, seed_asks
from autoprune.run.clock import Clock
from autoprune.run.constraints import Constrained, penalised
from autoprune.run.finals import export, finals, fitting, front_of
from autoprune.run.folder_checks import refuse_other
from autoprune.run.ledger import Ledger, Plateau
from autoprune.run.loop import evaluate_all, search_loop
from autoprune.run.opening import Opening
from autoprune.run.pace import Pace
from autoprune.run.plan import Plan, planned, spent_of
from autoprune.run.setting import Setting
from autoprune.run.telling import LOOKED_AGAIN, check_telling, dense_misses
from autoprune.run.timed import latencies
from autoprune.samplers import build_sampler, needs

STAGES = {"table": "sensitivity table", "proxy": "choice of the tier", "seed": "control arms and seeds"}
"""What a stage of the record is called while it runs."""
AFTER = ("held back", "finalists", "validation", "fine-tuned")
"""Stages that come after the search."""
T = TypeVar("T")
GOES_ON = "what was computed is kept, and the same command goes on"


def search(
    job: Job | str | Path | Mapping[str, Any], *, task: Task | None = None, out: Path | None = None, fresh: bool = False
) -> Run:
    """Start or resume the search of `job`; iterate the Run for the evaluations as they are told, or call `finish`.

    `task` is a Task made in Python (see `autoprune.task`); the job then needs no `task` section and everything is
    evaluated in this process. `out` is the run folder, by default runs/<job's name>; `fresh` forgets an earlier run.

    Raises:
        InputError: the job is wrong, or the folder belongs to a job that differs (names the keys).
        OutOfTimeError: search.time_limit_s was over before the model was analysed and the database built.
    """
    run = run_of(job, task=task, out=out, fresh=fresh)
    for _ in run.preparing():
        pass
    return run


def run_of(
    job: Job | str | Path | Mapping[str, Any], *, task: Task | None = None, out: Path | None = None, fresh: bool = False
) -> Run:
    """The Run of `search` before it is prepared, for who wants to see that too: iterate `preparing` first."""
    job = Job.of(job, task)
    folder = Path(out) if out is not None else Path("runs") / job.name
    return Run(job, folder, task, fresh)


class Run:
    """A search under way. Iterating drives it to the end; a run that was driven before replays from its record.

    `alone` is what a comparison has made ready for all its searches. Then nothing but the sampler's own ledger is
    spent, for a fair comparison: its seeds count against it, and no control arm is evaluated.
    `done` of `total` (full evaluations' worth) measures how far it is; `stage` names what it does, `counted` how far
    that is, `left_s` about how long all of the rest takes.
    """

    def __init__(
        self,
        job: Job,
        folder: Path,
        task: Task | None = None,
        fresh: bool = False,
        alone: Setting | None = None,
    ) -> None:
        self.path, self.stage, self.note, self._alone = folder, "prepare", "", alone is not None
        self._opening = Opening(job, folder, task, fresh, alone)
        self._made: Setting | None = None
        self._mirror: Mirror | None = None
        self._plan: Plan | None = None
        self._tabled: sensitivity.TablePlan | None = None
        self._executor: Executor | None = None
        self._clock, self._pace = Clock(None if alone is not None else job.search.time_limit_s), Pace()
        self._result: tuple[Front, tuple[Mapping[str, Any], ...]] | None = None
        self._held: list[Evaluation] = []

    def preparing(self) -> Iterator[Step]:
        """Make it ready, step by step, as long as there is time; nothing where that has happened.

        Raises:
            InputError, OutOfTimeError: see `search`.
        """
        if self._made is None:
            with self._in_time():
                self._made, self._mirror = yield from self._noted(self._opening.steps(), self._clock)

    def __iter__(self) -> Iterator[Evaluation]:
        """Evaluations as they are told: table, cascade, control arms, search, finalists."""
        s, self._clock = self.setting, self._clock if self._plan is None else self._clock.again()
        storage = s.job.storage_url
        with (
            Record(self.path, s.structure, s.problem.objectives, s.tier, s.identity, storage) as record,
            self._mirror or nullcontext(),
            self._in_time(),
        ):
            refuse_other(s.job, record.fact("job"), f"the record of {self.path}")
            record.note("job", s.job.portable())
            arms = () if self._alone else s.controls
            self._tabled = s.table_plan(record.horizon(s.job.search.trials)) if needs_table(s.job, arms) else None
            self._plan = plan = planned(s, arms, self._tabled)
            write_event(self.path, "start", s.facts())
            self._executor = executor = s.executor()
            self._pace.begin(executor.slots)
            try:
                said = self.note
                for evaluation in self._stages(record, executor):
                    plan.told(self.stage, evaluation)
                    self._pace.told(executor)
                    if self.note == said:  # a new note is shown before the mirror speaks
                        self._hear()
                    said = self.note
                    yield evaluation
            finally:
                write_event(
                    self.path, "workers", {"workers": [asdict(w) for w in self.workers], "retried": self.retried}
                )
                executor.close()
                self._executor = None
            yield from self._priced(plan)
        self._hear()

    def _priced(self, plan: Plan) -> Iterator[Evaluation]:
        """What the container costs, where the job has one: the front is on disk by now, and then has that as well."""
        pricing = price.Pricing(self.setting, self.path, self._held, self._tabled, plan, self._clock)
        self._executor = pricing.executor
        for evaluation in pricing:
            self.stage = pricing.stage
            plan.told(self.stage, evaluation)
            yield evaluation
        self._executor, self.stage, self.note = None, "done", pricing.note or self.note
        if pricing.rows and self._result is not None:
            front, rows = self._result
            priced = replace(front, provenance={**front.provenance, "price": [dict(row) for row in pricing.rows]})
            self._result = priced, price.told(rows, pricing.rows)
            export(self.path, *self._result, self.spent)

    @property
    def price(self) -> tuple[Mapping[str, Any], ...]:
        """At each asked budget what the job's container costs in loss; none where it leaves nothing out."""
        return tuple(self.front.provenance.get("price", ()))

    @property
    def setting(self) -> Setting:
        """The job made ready, at the tier that the run has settled on."""
        for _ in self.preparing():
            pass
        assert self._made is not None
        return self._made

    def finish(self) -> Run:
        """Drive the run to its end."""
        for _ in self:
            pass
        return self

    @property
    def done(self) -> float:
        """Full evaluations' worth of work that is done."""
        return 0.0 if self._plan is None else self._plan.done(self.setting.tier)

    @property
    def total(self) -> float:
        """Full evaluations' worth of work, as far as it is known; later stages are guessed until they begin."""
        return 0.0 if self._plan is None else self._plan.total(self.setting.tier)

    @property
    def counted(self) -> str:
        """How far the stage is, in words."""
        if self._plan is None or self._made is None:
            return self._pace.counted
        return self._plan.counted(self.stage, self._made.tier) or self._pace.counted

    @property
    def left_s(self) -> float | None:
        """About how many seconds all that is left takes, by what was measured so far; None where nothing was."""
        if self._plan is None or self._executor is None:
            return self._pace.left_s
        return self._plan.left_s(self._pace.parallel)

    @property
    def needs(self) -> str:
        """What memory and disk the run needs, in one line."""
        s = self.setting
        return "" if s.needs is None else s.needs.said(s.n_workers)

    @property
    def spent(self) -> Mapping[str, float]:
        """What each stage of a finished run took, in whichever call, in full evaluations; "search" is the ledger."""
        order = (*STAGES.values(), "search", *AFTER, *price.STAGES)
        return {} if self._plan is None else spent_of(self.setting, self._plan, order, STAGES["table"], self._tabled)

    @property
    def workers(self) -> Sequence[WorkerState]:
        """How each worker is doing; none before and after the run."""
        return () if self._executor is None else self._executor.workers()

    @property
    def retried(self) -> int:
        """Asks that had to be tried again since this call started."""
        return 0 if self._executor is None else self._executor.retried

    @property
    def front(self) -> Front:
        """The exported front; drives the run to its end if that has not happened."""
        return self._finished()[0]

    @property
    def summary(self) -> tuple[Mapping[str, Any], ...]:
        """One row for each asked budget and arm (search, uniform, global)."""
        return self._finished()[1]

    @property
    def study(self) -> Any:
        """The Optuna study of the run, read from its journal or database; None before its first evaluation."""
        return load_study(find_home(self.path, self.setting.job.storage_url))

    def _finished(self) -> tuple[Front, tuple[Mapping[str, Any], ...]]:
        if self._result is None:
            self.finish()
        assert self._result is not None
        return self._result

    def _noted(self, steps: Generator[Step, None, T], clock: Clock) -> Generator[Step, None, T]:
        """Steps that whoever looks on sees; whatever time a call is given, it takes the first one."""
        begun = False

        def note(step: Step) -> Step:
            nonlocal begun
            clock.check() if begun else None
            begun = True
            self._pace.take(step)
            self.stage = step.stage
            return step

        return relayed(steps, note)

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """What is said where the time is over before there is a front."""
        try:
            yield
        except OutOfTimeError as error:
            write_event(self.path, "stopped", {"reason": str(error), "stage": self.stage})
            raise OutOfTimeError(f"{error} in the stage {self.stage!r}, before there is a front; {GOES_ON}") from None

    def _hear(self) -> None:
        """Pass on what the mirror has to say."""
        self.note = (self._mirror.news() if self._mirror is not None else "") or self.note

    def _begin(self, stage: str, asks: Labelled) -> None:
        assert self._plan is not None
        self.stage = stage
        self._plan.expect(stage, asks)

    def _stages(self, record: Record, executor: Executor) -> Iterator[Evaluation]:
        def evaluate(stage: Stage, asks: Labelled) -> Iterator[Evaluation]:
            self._begin(STAGES[stage], asks)
            return evaluate_all(record, executor, asks, stage, self._clock)

        s, tabled = self.setting, self._tabled
        self._speak()
        if tabled is not None:
            tabling = measured_table(s.structure, s.table_path(tabled), tabled, partial(evaluate, "table"))
            self._made = s = s.with_table((yield from tabling))
        if s.job.evaluator.leaves_tier:
            found = yield from chosen_tier(s.problem, s.job.search.seed, partial(evaluate, "proxy"))
            self._made, self.note = s.at_tier(found.tier), found.verdict
            s = self.setting
            write_event(self.path, "proxy", found.facts())
            write_whole(self.path / "proxy.json", json.dumps(found.facts(), indent=1))
        record.tier = s.tier
        seeds: list[Evaluation] = []
        for evaluation in evaluate("seed", self._seed_asks(record)):
            seeds.append(evaluation)
            yield evaluation
        self.note = dense_misses(seeds, s.structure, s.constraints) or self.note
        told, s = list(seeds), self.setting
        check_telling(told, s.problem, s.settings.loss)
        for evaluation in self._search(record, executor, seeds):
            told.append(evaluation)
            if len(told) == LOOKED_AGAIN:
                check_telling(told, s.problem, s.settings.loss, searched=True)
            yield evaluation
        check_telling(told[:LOOKED_AGAIN], s.problem, s.settings.loss, searched=True)
        yield from self._end(record, executor, told)

    def _speak(self) -> None:
        """Say what the search goes by (loss, samples, sensitivity and latency table), and what there is to do."""
        s, said = self.setting, self.setting.fidelity
        assert self._plan is not None
        write_event(self.path, "loss", {"name": said.name, "classes": said.classes, "why": said.why})
        if s.latency is not None:
            write_event(self.path, "latency", s.latency.summary())
        self.note = "; ".join([*s.notes(self._tabled), self._plan.said(s.tier)])

    def _seed_asks(self, record: Record) -> Labelled:
        """What the search starts from; alone, only where its sampler wants any, and on its own ledger."""
        s, part = self.setting, self.setting.job.search
        if not self._alone:
            return seed_asks(s.problem, s.controls, s.job.warm_start)
        if not needs(part.sampler, s.job.options("search")).seeds:
            return []
        return seed_asks(s.problem, s.controls, s.job.warm_start, record.horizon(part.trials))

    def _search(self, record: Record, executor: Executor, seeds: list[Evaluation]) -> Iterator[Evaluation]:
        s, part, plan = self.setting, self.setting.job.search, self._plan
        assert plan is not None
        self.stage = "search"
        dense = Policy.dense(s.structure)  # its loss is 0: no start for a search, and no logarithm
        usable = tuple(penalised(s.constraints, e) for e in seeds if e.ok and e.ask.policy != dense)
        problem = replace(s.problem, seeds=usable, n_trials=record.horizon(part.trials))
        sampler = build_sampler(part.sampler, problem, np.random.default_rng(part.seed), s.job.options("search"))
        rest_s = plan.left_s(self._pace.parallel, AFTER) or 0.0  # alone, all calls count, so that arms have the same
        clock = self._clock.for_search(part.time_limit_s, record.clock() if self._alone else None, rest_s)
        ledger = Ledger(
            max(0.0, part.trials - (s.worth(e.ask for e in seeds) if self._alone else 0.0)),
            lambda ask: s.prices.full(ask, s.tier),
            (e.ask for e in seeds),
            part.patience,
            Plateau(problem, partial(penalised, s.constraints)) if part.patience else None,
            lambda: clock.out,
        )
        watched = Constrained(sampler, s.constraints) if s.constraints else sampler
        yield from search_loop(record, executor, watched, ledger, part.window, len(seeds), clock)
        plan.settle("search")
        if ledger.stopped:
            self.note = (
                f"the search stopped after {ledger.spent:.0f} of {part.trials} full evaluations: {ledger.stopped}"
            )
            write_event(self.path, "stopped", {"reason": ledger.stopped, "spent": ledger.spent})

    def _end(self, record: Record, executor: Executor, told: list[Evaluation]) -> Iterator[Evaluation]:
        """The finals, and the front."""
        late: list[str] = []
        plan = self._plan
        assert plan is not None

        def evaluated(stage: str, asks: Labelled) -> Generator[Evaluation, None, list[Evaluation]]:
            self._begin(stage, asks)
            done = []
            try:
                for evaluation in evaluate_all(record, executor, asks, "final", self._clock):
                    done.append(evaluation)
                    yield evaluation
            except OutOfTimeError:
                late.append(f"{stage} after {len(done)} of {len(asks)} evaluations")
                plan.settle(stage)
            return done

        def fit(n: int) -> int:
            return fitting(self.setting, plan, self._clock, self._pace.parallel, n)

        def remeasured(policies: list[Policy]) -> Mapping[Policy, Any]:
            return finished(self._noted(latencies(self.setting, policies), Clock(None)))

        s, controls = self.setting, () if self._alone else self.setting.controls
        found = yield from finals(s, told, controls, evaluated, fit)
        self._held = (yield from evaluated(price.HELD, asks)) if (asks := price.held_asks(s)) else []
        self._result = front, rows = front_of(s, told, found, remeasured)
        if late:
            self.note = f"the time limit ended {', '.join(late)}; the front holds what was scored; {GOES_ON}"
            write_event(self.path, "stopped", {"reason": self.note})
        elif s.latency is not None and (fastest := min(p.ratio("latency") for p in front)) >= 1.0:
            self.note = (
                f"no point of the front is faster than the dense model: the fastest takes {fastest:.2f} of its time"
            )
        export(self.path, front, rows, self.spent)
