"""The verb `search`: control arms, the search loop, finalists, the exported front. Everything finished is on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from autoprune.allocation.sensitivity import blank_table, table_asks
from autoprune.errors import InputError, RunError
from autoprune.evaluation import Ask, Evaluation, Labelled
from autoprune.evaluator.fidelity import AUTO
from autoprune.files.job import Job, changed_keys, changed_since
from autoprune.files.policy_file import save_csv, save_front
from autoprune.files.whole import write_whole
from autoprune.front import Front
from autoprune.policy import Policy
from autoprune.protocols import Executor, Task, WorkerState
from autoprune.record.folder import new_folder, write_event
from autoprune.record.mirror import Mirror
from autoprune.record.record import Record, Stage, locked
from autoprune.record.storage import JOURNAL, find_home, forget_study, load_study
from autoprune.run import after
from autoprune.run.before import CONTROL_ARMS, calibrated, control_policies, seed_asks, tabled
from autoprune.run.constraints import Constrained, penalised
from autoprune.run.ledger import Ledger, Plateau
from autoprune.run.loop import evaluate_all, search_loop
from autoprune.run.prepare import check_executor, prepare
from autoprune.run.setting import Setting
from autoprune.run.telling import cannot_tell
from autoprune.samplers import build_sampler, needs

RUN_FILES = ("job.yaml", "policy.json", "front.csv", "report.html", "log.jsonl", "proxy.json", "finetune.json")
MIRRORED = (*RUN_FILES, JOURNAL)
RUN_FOLDERS = ("tune", "finetuned")
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
    if task is not None and isinstance(job, Mapping):
        job = {"task": {"factory": "autoprune:task"}, **job}
    job = Job.of(job)
    folder = Path(out) if out is not None else Path("runs") / job.name
    return Run(job, folder, task, fresh)


class Run:
    """A search under way. Iterating drives it to the end; a run that was driven before replays from its record.

    With `alone` nothing but the sampler's own ledger is spent: its seeds count against it, and no control arm is
    evaluated, for a fair comparison. `shared` is a folder of level databases that several runs use.
    `done` of `total` (full evaluations' worth) measures how far it is; `stage` names what it does.
    """

    def __init__(
        self,
        job: Job,
        folder: Path,
        task: Task | None = None,
        fresh: bool = False,
        alone: bool = False,
        shared: Path | None = None,
    ) -> None:
        if not fresh:
            _check_same_job(job, folder)
        check_executor(job)
        _check_storage(job, folder, fresh)
        self.path, self.stage, self.note, self._alone = folder, "prepare", "", alone
        with new_folder(folder):
            self._mirror = None if alone or job.sync_url is None else Mirror(folder, job.sync_url, MIRRORED)
            if self._mirror is not None and not fresh:
                _go_on_from(self._mirror, job)
            self._setting: Setting = prepare(job, folder, task, shared)
            self._fail_early()
        self.done, self._plan = 0.0, dict[str, float]()
        self._executor: Executor | None = None
        with locked(folder):
            if fresh:  # not before the new job has proved good
                _forget(folder, self._setting.database_path)
                forget_study(folder, job.storage_url)
                self._mirror.forget() if self._mirror is not None else None
            write_whole(folder / "job.yaml", job.dump())
        self._result: tuple[Front, tuple[Mapping[str, Any], ...]] | None = None

    def __iter__(self) -> Iterator[Evaluation]:
        """Evaluations as they are told: table, cascade, control arms, search, finalists."""
        s, self.done, self._plan = self._setting, 0.0, self._planned()
        storage = s.job.storage_url
        with (
            Record(self.path, s.structure, s.problem.objectives, s.tier, s.identity, storage) as record,
            self._mirror or nullcontext(),
        ):
            _refuse_other(s.job, record.fact("job"), f"the record of {self.path}")
            record.note("job", s.job.portable())
            facts = {"groups": len(s.structure), "trials": s.job.search.trials, "database_s": round(s.built_s, 3)}
            write_event(self.path, "start", facts)
            self._executor = executor = s.executor()
            try:
                said, counted = self.note, set[Ask]()
                for evaluation in self._stages(record, executor):
                    self.done += self._setting.price(evaluation.ask) if evaluation.ask not in counted else 0.0
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
            asks = table_asks(s.structure, max(1, s.job.evaluator.sensitivity))
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
        job, problem = self._setting.job, self._setting.problem
        part, there_will_be = job.search, job.evaluator.sensitivity > 0
        blank = replace(problem, table=blank_table(problem.structure) if there_will_be else None)
        build_sampler(part.sampler, blank, np.random.default_rng(0), part.options).ask()
        seed_asks(self._setting)

    def _planned(self) -> dict[str, float]:
        """What the stages will roughly cost: right enough for an ETA."""
        s, arms = self._setting, 0 if self._alone else len(CONTROL_ARMS)
        n, at = after.n_finalists(s, s.job.search.trials), len(s.problem.budget.at)
        tune = s.price(Ask(Policy.dense(s.structure), "tune"))
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

        said = self._setting.fidelity
        write_event(self.path, "loss", {"name": said.name, "classes": said.classes, "why": said.why})
        notes = [f"loss {said.name}: {said.why}"] if self._setting.job.objectives.loss == AUTO else []
        if self._setting.latency is not None:
            notes.append(self._setting.latency.verdict())
            write_event(self.path, "latency", self._setting.latency.summary())
        self.note = "; ".join(notes)
        self._setting = yield from tabled(self._setting, evaluate)
        self._setting, found = yield from calibrated(self._setting, evaluate)
        if found is not None:
            self.note = found.verdict
            write_event(self.path, "proxy", found.facts())
            write_whole(self.path / "proxy.json", json.dumps(found.facts(), indent=1))
        record.tier = self._setting.tier
        seeds: list[Evaluation] = []
        if not self._alone or needs(self._setting.job.search.sampler, self._setting.job.search.options).seeds:
            ledger = record.horizon(self._setting.job.search.trials) if self._alone else None
            for evaluation in evaluate("seed", seed_asks(self._setting, ledger)):
                seeds.append(evaluation)
                yield evaluation
        self._warn_of_dense(seeds)
        s = self._setting
        if s.problem.logarithmic and (reason := cannot_tell(seeds, s.problem.budget.cost, s.settings.loss)):
            raise RunError(reason)
        told = list(seeds)
        for evaluation in self._search(record, executor, seeds):
            told.append(evaluation)
            yield evaluation
        self._plan["search"] = self._setting.worth(e.ask for e in told[len(seeds) :])
        yield from self._finals(record, executor, told)

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
        sampler = build_sampler(part.sampler, problem, np.random.default_rng(part.seed), part.options)
        ledger = Ledger(
            max(0.0, part.trials - (s.worth(e.ask for e in seeds) if self._alone else 0.0)),
            s.price,
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

    def _finals(self, record: Record, executor: Executor, told: list[Evaluation]) -> Iterator[Evaluation]:
        """Re-rank the front on held-back samples, tune the finalists, score on validation, export."""
        s, controls = self._setting, {} if self._alone else control_policies(self._setting.problem)

        def evaluated(stage: str, asks: Labelled, done: list[Evaluation]) -> Iterator[Evaluation]:
            self._begin(stage, asks)
            for evaluation in evaluate_all(record, executor, asks, "final"):
                done.append(evaluation)
                yield evaluation

        held: list[Evaluation] = []
        scored: list[Evaluation] = []
        tuned: list[Evaluation] = []
        final: list[Evaluation] = []
        spent = s.worth(e.ask for e in told)
        chosen = after.contenders(s, told, after.n_finalists(s, spent))
        yield from evaluated("held back", after.heldback_asks(s, told, chosen), held)
        yield from evaluated("finalists", after.finalist_asks(chosen), tuned)
        ranked = after.reranked(s, told, held)
        winners = after.winners(s, ranked, tuned)
        yield from evaluated("validation", after.validation_asks(s, ranked, winners, controls), scored)
        yield from evaluated("fine-tuned", after.tuned_asks(s, winners, controls), final)
        full = [(i, e) for i, e in enumerate(told) if e.ask.fraction == 1.0 and e.ask.tier == s.tier]
        trials = {e.ask.policy: i for i, e in reversed(full)}
        known = [e for e in scored if e.ask.policy in trials]  # alone, the dense model is measured but never found
        points = after.exported(s, known, final, winners, controls)
        latencies = after.measured_latencies(s, points)
        fastest = min((found["ratio"] for found in latencies.values()), default=0.0)
        if fastest >= 1.0:
            self.note = (
                f"no point of the front is faster than the dense model: the fastest takes {fastest:.2f} of its time"
            )
        front = after.export_front(s, points, scored[0], final, trials, latencies)
        rows = after.summarise(s, after.Told(front, winners, controls, (*told, *held, *scored, *final)))
        self._result = (front, rows)
        self._export(front, rows)

    def _export(self, front: Front, rows: tuple[Mapping[str, Any], ...]) -> None:
        from autoprune.report import build_report

        self.stage = "done"
        save_front(front, self.path / "policy.json")
        save_csv(front, self.path / "front.csv")
        write_event(self.path, "summary", {"rows": rows, "spent": self.spent})
        build_report(self.path)


def _check_same_job(job: Job, folder: Path) -> None:
    """What may change between calls: trials upwards, the executor; InputError names the rest."""
    if not (folder / "job.yaml").exists():
        return
    _refuse(changed_keys(Job.load(folder / "job.yaml"), job), str(folder))


def _check_storage(job: Job, folder: Path, fresh: bool) -> None:
    """That the database answers, before minutes of work, and that a run begun on another machine had the same job."""
    if job.storage is None:
        return
    home = find_home(folder, job.storage_url)
    try:
        study = None if fresh else load_study(home)
        held = None if study is None else home.read(lambda: study.user_attrs.get("job"))
    finally:
        home.close()
    _refuse_other(job, held, f"the study {home.study_name} in {home.shown}")


def _refuse_other(job: Job, held: Mapping[str, Any] | None, where: str) -> None:
    _refuse(() if held is None else changed_since(held, job), where)


def _refuse(keys: tuple[str, ...], where: str) -> None:
    if keys:
        raise InputError(
            f"{where} holds a run of another job: {', '.join(keys)} differ; trials may grow and executor.* may "
            f"change, for anything else choose another --out or start anew with --fresh"
        )


def _go_on_from(mirror: Mirror, job: Job) -> None:
    """Bring the run here where the mirror is ahead, unless it is another job's."""
    before = mirror.job()
    if before is not None:
        _refuse(changed_keys(Job.loads(before, source=f"{mirror.url}/job.yaml"), job), mirror.url)
    with locked(mirror.folder):
        mirror.fetch()


def _forget(folder: Path, database: Path) -> None:
    """Remove the files of an earlier run, and nothing else."""
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    for name in RUN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in (folder / "database").glob("*.safetensors"):
        if path != database:
            path.unlink()
