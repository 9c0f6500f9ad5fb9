"""The verb `search`: control arms, the search loop, finalists, the exported front. Everything finished is on disk."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from autoprune.allocation.sensitivity import Plan, table_asks
from autoprune.evaluation import Ask, Evaluation, Labelled
from autoprune.evaluator.prepared import prepared_model
from autoprune.files.job import Job
from autoprune.files.policy_file import save_csv, save_front
from autoprune.files.whole import write_whole
from autoprune.front import Front
from autoprune.latency.whole_models import remeasure
from autoprune.policy import Policy
from autoprune.protocols import Executor, Task, WorkerState
from autoprune.record.folder import new_folder, write_event
from autoprune.record.lock import locked
from autoprune.record.mirror import Mirror
from autoprune.record.record import Record, Stage
from autoprune.record.storage import find_home, forget_study, load_study
from autoprune.run import after
from autoprune.run.before import chosen_tier, control_policies, measured_table, seed_asks
from autoprune.run.constraints import Constrained, penalised
from autoprune.run.exported import Finding, measured_on, points_of, provenance, scored_base, volume_facts
from autoprune.run.folder_checks import (
    MIRRORED,
    check_storage,
    forget,
    go_on_from,
    recorded_identity,
    refuse_other,
    same_job,
)
from autoprune.run.ledger import Ledger, Plateau
from autoprune.run.loop import evaluate_all, search_loop
from autoprune.run.prepare import check_executor, prepare
from autoprune.run.rehearsal import named, rehearse_recovery, rehearse_sampler, rehearse_strategy
from autoprune.run.setting import Setting
from autoprune.run.summary import Told, summarise
from autoprune.run.telling import LOOKED_AGAIN, check_telling
from autoprune.samplers import build_sampler, needs
from autoprune.strategies import uses_table

STAGES = {"table": "sensitivity table", "proxy": "choice of the tier", "seed": "control arms and seeds"}
"""What a stage of the record is called while it runs."""


def search(
    job: Job | str | Path | Mapping[str, Any], *, task: Task | None = None, out: Path | None = None, fresh: bool = False
) -> Run:
    """Start or resume the search of `job`; iterate the Run for the evaluations as they are told, or call `finish`.

    `task` is a Task made in Python (see `autoprune.task`); the job then needs no `task` section and everything is
    evaluated in this process. `out` is the run folder, by default runs/<job's name>; `fresh` forgets an earlier run.

    Raises:
        InputError: the job is wrong, or the folder belongs to a job that differs (names the keys).
    """
    job = Job.of(job, task)
    folder = Path(out) if out is not None else Path("runs") / job.name
    return Run(job, folder, task, fresh)


class Run:
    """A search under way. Iterating drives it to the end; a run that was driven before replays from its record.

    `alone` is what a comparison has made ready for all its searches. Then nothing but the sampler's own ledger is
    spent, for a fair comparison: its seeds count against it, and no control arm is evaluated.
    `done` of `total` (full evaluations' worth) measures how far it is; `stage` names what it does.
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
        self.done, self._plan, self._tabled = 0.0, dict[str, float](), Plan()
        self._executor: Executor | None = None
        self._result: tuple[Front, tuple[Mapping[str, Any], ...]] | None = None
        with new_folder(folder), locked(folder):  # who uses it already is told now, and not after the preparation
            if not fresh:
                job = same_job(job, folder)
            check_storage(job, folder, fresh)
            self._mirror = None if self._alone or job.sync_url is None else Mirror(folder, job.sync_url, MIRRORED)
            if self._mirror is not None and not fresh:
                go_on_from(self._mirror, job)
            self._setting = self._ready(job, task, fresh) if alone is None else alone.with_table(None)
            self._fail_early()
            if fresh:  # not before the new job has proved good
                forget(folder, self._setting.database_path, self._setting.samples_path)
                forget_study(folder, job.storage_url)
                self._mirror.forget() if self._mirror is not None else None
            write_whole(folder / "job.yaml", job.dump())

    def _ready(self, job: Job, task: Task | None, fresh: bool) -> Setting:
        check_executor(job)
        rehearse_recovery(job)
        return prepare(job, self.path, task, recorded={} if fresh else recorded_identity(job, self.path))

    def __iter__(self) -> Iterator[Evaluation]:
        """Evaluations as they are told: table, cascade, control arms, search, finalists."""
        s, self.done, self._plan = self._setting, 0.0, self._planned()
        storage = s.job.storage_url
        with (
            Record(self.path, s.structure, s.problem.objectives, s.tier, s.identity, storage) as record,
            self._mirror or nullcontext(),
        ):
            refuse_other(s.job, record.fact("job"), f"the record of {self.path}")
            record.note("job", s.job.portable())
            facts = {"groups": len(s.structure), "trials": s.job.search.trials, "database_s": round(s.built_s, 3)}
            facts["memory"] = s.settings.memory  # bytes of entries that are kept
            write_event(self.path, "start", facts)
            self._executor = executor = s.executor()
            try:
                said, counted = self.note, set[Ask]()
                for evaluation in self._stages(record, executor):
                    self.done += s.worth([evaluation.ask]) if evaluation.ask not in counted else 0.0
                    counted.add(evaluation.ask)
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
        self._hear()

    @property
    def setting(self) -> Setting:
        """The job made ready, at the tier that the run has settled on."""
        return self._setting

    def finish(self) -> Run:
        """Drive the run to its end."""
        for _ in self:
            pass
        return self

    @property
    def total(self) -> float:
        """Full evaluations' worth of work, as far as it is known; later stages are guessed until they begin."""
        return sum(self._plan.values())

    @property
    def spent(self) -> Mapping[str, float]:
        """What each stage of a finished run took, in whichever call, in full evaluations; "search" is the ledger."""
        s, found = self._setting, dict(self._plan)
        if s.problem.table is not None:  # it may have been there
            asks = table_asks(s.structure, self._tabled)
            found[STAGES["table"]] = s.worth(ask for _, ask in asks)
        order = (*STAGES.values(), "search", "held back", "finalists", "validation", "fine-tuned")
        return {stage: found[stage] for stage in order if found.get(stage, 0.0) > 0}

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
        return load_study(find_home(self.path, self._setting.job.storage_url))

    def _finished(self) -> tuple[Front, tuple[Mapping[str, Any], ...]]:
        if self._result is None:
            self.finish()
        assert self._result is not None
        return self._result

    def _hear(self) -> None:
        """Pass on what the mirror has to say."""
        self.note = (self._mirror.news() if self._mirror is not None else "") or self.note

    def _fail_early(self) -> None:
        """What would only be found wrong after minutes of work."""
        s, part = self._setting, self._setting.job.search
        rehearse_sampler(part.sampler, s.problem, s.job.options("search"), tabled=s.job.evaluator.has_table)
        for name in s.controls:
            with named("compare.controls", name):
                rehearse_strategy(name, s.problem)
        seed_asks(s.problem, s.controls, s.job.warm_start)

    def _planned(self) -> dict[str, float]:
        """What the stages will roughly cost: right enough for an ETA."""
        s, arms = self._setting, 0 if self._alone else len(self._setting.controls)
        least, trials = s.job.evaluator.tuned_finalists, s.job.search.trials
        n, at = after.n_finalists(least, s.problem, s.prices, trials), len(s.problem.budget.at)
        tune = s.worth([Ask(Policy.dense(s.structure), "tune")])
        points = after.MAX_POINTS * 1.0
        plan = {"search": float(s.job.search.trials), "held back": points, "validation": points}
        return plan | {"finalists": n * at * tune, "fine-tuned": (1 + arms) * at * tune * min(n, 1)}

    def _begin(self, stage: str, asks: Labelled) -> None:
        self.stage = stage
        self._plan[stage] = self._setting.worth(ask for _, ask in asks)

    def _stages(self, record: Record, executor: Executor) -> Iterator[Evaluation]:
        def evaluate(stage: Stage, asks: Labelled) -> Iterator[Evaluation]:
            self._begin(STAGES[stage], asks)
            return evaluate_all(record, executor, asks, stage)

        s = self._setting
        plan = s.table_plan(record.horizon(s.job.search.trials)) if self._has_table() else None
        self._speak(plan)
        if plan is not None:
            self._tabled = plan
            self._setting = s.with_table(
                (yield from measured_table(s.structure, s.table_path(plan), plan, partial(evaluate, "table")))
            )
        if self._setting.job.evaluator.leaves_tier:
            seed = self._setting.job.search.seed
            found = yield from chosen_tier(self._setting.problem, seed, partial(evaluate, "proxy"))
            self._setting, self.note = self._setting.at_tier(found.tier), found.verdict
            write_event(self.path, "proxy", found.facts())
            write_whole(self.path / "proxy.json", json.dumps(found.facts(), indent=1))
        record.tier = self._setting.tier
        seeds: list[Evaluation] = []
        for evaluation in evaluate("seed", self._seed_asks(record)):
            seeds.append(evaluation)
            yield evaluation
        self._warn_of_dense(seeds)
        told = list(seeds)
        check_telling(told, self._setting.problem, self._setting.settings.loss)
        for evaluation in self._search(record, executor, seeds):
            told.append(evaluation)
            if len(told) == LOOKED_AGAIN:
                check_telling(told, self._setting.problem, self._setting.settings.loss)
            yield evaluation
        check_telling(told[:LOOKED_AGAIN], self._setting.problem, self._setting.settings.loss)
        self._plan["search"] = self._setting.worth(e.ask for e in told[len(seeds) :])
        self._export(told, (yield from self._finals(record, executor, told)))

    def _speak(self, plan: Plan | None) -> None:
        """Say which loss, how many samples, which sensitivity and latency table the search goes by."""
        s, said = self._setting, self._setting.fidelity
        write_event(self.path, "loss", {"name": said.name, "classes": said.classes, "why": said.why})
        if s.latency is not None:
            write_event(self.path, "latency", s.latency.summary())
        self.note = "; ".join(s.notes(plan))

    def _has_table(self) -> bool:
        """Whether the sampler or a control arm works from a sensitivity table, and the job lets it be measured."""
        job, controls = self._setting.job, () if self._alone else self._setting.controls
        wanted = needs(job.search.sampler, job.options("search")).table or any(map(uses_table, controls))
        return job.evaluator.has_table and wanted

    def _seed_asks(self, record: Record) -> Labelled:
        """What the search starts from; alone, only where its sampler wants any, and on its own ledger."""
        s, part = self._setting, self._setting.job.search
        if not self._alone:
            return seed_asks(s.problem, s.controls, s.job.warm_start)
        if not needs(part.sampler, s.job.options("search")).seeds:
            return []
        return seed_asks(s.problem, s.controls, s.job.warm_start, record.horizon(part.trials))

    def _warn_of_dense(self, seeds: list[Evaluation]) -> None:
        """Say it before the budget is spent where the dense model itself misses a constraint."""
        s, dense = self._setting, Policy.dense(self._setting.structure)
        own = next((e.metrics for e in seeds if e.ok and e.ask.policy == dense), {})
        missed = [f"{c}, of which it has {own[c.metric]:.4g}" for c in s.constraints if c.miss(own) > 0]
        if missed:
            self.note = f"on the fitness samples the dense model itself misses {' and '.join(missed)}"

    def _search(self, record: Record, executor: Executor, seeds: list[Evaluation]) -> Iterator[Evaluation]:
        s, part = self._setting, self._setting.job.search
        self.stage = "search"
        dense = Policy.dense(s.structure)  # its loss is 0: no start for a search, and no logarithm
        usable = tuple(penalised(s.constraints, e) for e in seeds if e.ok and e.ask.policy != dense)
        problem = replace(s.problem, seeds=usable, n_trials=record.horizon(part.trials))
        sampler = build_sampler(part.sampler, problem, np.random.default_rng(part.seed), s.job.options("search"))
        ledger = Ledger(
            max(0.0, part.trials - (s.worth(e.ask for e in seeds) if self._alone else 0.0)),
            lambda ask: s.prices.full(ask, s.tier),
            (e.ask for e in seeds),
            part.patience,
            Plateau(problem, partial(penalised, s.constraints)) if part.patience else None,
            lambda: part.time_limit_s is not None and record.clock() >= part.time_limit_s,
        )
        watched = Constrained(sampler, s.constraints) if s.constraints else sampler
        yield from search_loop(record, executor, watched, ledger, part.window, first=len(seeds))
        if ledger.stopped:
            self.note = (
                f"the search stopped after {ledger.spent:.0f} of {part.trials} full evaluations: {ledger.stopped}"
            )
            write_event(self.path, "stopped", {"reason": ledger.stopped, "spent": ledger.spent})

    def _finals(
        self, record: Record, executor: Executor, told: list[Evaluation]
    ) -> Generator[Evaluation, None, _Finals]:
        """Re-rank the front on held-back samples, tune the finalists, score on validation."""
        s, problem, constraints = self._setting, self._setting.problem, self._setting.constraints
        controls = {} if self._alone else control_policies(problem, s.controls)

        def evaluated(stage: str, asks: Labelled) -> Generator[Evaluation, None, list[Evaluation]]:
            self._begin(stage, asks)
            done = []
            for evaluation in evaluate_all(record, executor, asks, "final"):
                done.append(evaluation)
                yield evaluation
            return done

        n = after.n_finalists(s.job.evaluator.tuned_finalists, problem, s.prices, s.worth(e.ask for e in told))
        chosen = after.contenders(told, n, problem, constraints)
        held = yield from evaluated("held back", after.heldback_asks(told, chosen, problem, constraints))
        judged = yield from evaluated("finalists", after.finalist_asks(chosen))
        ranked = after.reranked(told, held, problem.tier, s.prices)
        winners = after.winners(ranked, judged, problem.budget, constraints)
        scored = yield from evaluated("validation", after.validation_asks(ranked, winners, controls, problem))
        tunes = s.job.evaluator.tuned_finalists > 0
        tuned = yield from evaluated("fine-tuned", after.tuned_asks(winners, controls) if tunes else [])
        return _Finals(held, scored, tuned, winners, controls)

    def _export(self, told: list[Evaluation], finals: _Finals) -> None:
        """Make the front and the result table, and write them."""
        from autoprune.report import build_report

        s, found = self._setting, finals
        full = [(i, e) for i, e in enumerate(told) if e.ask.fraction == 1.0 and e.ask.tier == s.tier]
        trials = {e.ask.policy: i for i, e in reversed(full)}
        known = [e for e in found.scored if e.ask.policy in trials]  # alone, the dense model is never found
        chosen = after.exported(known, found.tuned, found.winners, found.controls, s.problem, s.constraints)
        trained = [e for e in chosen if e.ask.tier == "tune"]  # where that is the fitness, the front itself is tuned
        fine, latencies = {e.ask.policy: e for e in (*trained, *found.tuned) if e.ok}, self._latencies(chosen)
        findings = [Finding(e, fine.get(p), trials[p], latencies.get(p)) for e in chosen for p in [e.ask.policy]]
        base = scored_base(s.base, found.scored[0], s.database)
        points = points_of(findings, base, s.database, s.settings)
        facts = provenance(s.job) | volume_facts(points, s.problem)
        front = Front(points, base, measured_on(s.settings, s.latency), facts)
        evaluations = (*told, *found.held, *found.scored, *found.tuned)
        rows = summarise(Told(front, found.winners, found.controls, evaluations, s.tier), s.problem.budget.at)
        self._result, self.stage = (front, rows), "done"
        save_front(front, self.path / "policy.json")
        save_csv(front, self.path / "front.csv")
        write_event(self.path, "summary", {"rows": rows, "spent": self.spent})
        build_report(self.path)

    def _latencies(self, points: Sequence[Evaluation]) -> Mapping[Policy, Mapping[str, float]]:
        """The points' latencies, measured anew as ratios to the dense model (a search predicts them), where asked."""
        s = self._setting
        if s.latency is None:
            return {}
        model, inputs = prepared_model(s.task, s.settings.torch_device), s.task.example_inputs()
        policies, table = [e.ask.policy for e in points], s.latency
        timings = remeasure(model, inputs, s.structure, policies, table.runtime, table.batch_size, s.job.search.seed)
        fastest = min((t.ratio for t in timings.values()), default=0.0)
        if fastest >= 1.0:
            self.note = (
                f"no point of the front is faster than the dense model: the fastest takes {fastest:.2f} of its time"
            )
        return {policy: {"ratio": t.ratio, "iqr": t.iqr} for policy, t in timings.items()}


@dataclass(frozen=True)
class _Finals:
    """What the final stages came to: evaluations by stage, the winner at each asked budget, the control arms."""

    held: Sequence[Evaluation]
    scored: Sequence[Evaluation]
    tuned: Sequence[Evaluation]
    winners: Mapping[float, Policy]
    controls: after.Controls
