"""The verb `search`: control arms, the search loop, finalists, the exported front. Everything finished is on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from autoprune import finals, plugins
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.front import Front
from autoprune.job import Job, changed_keys
from autoprune.policy import Policy
from autoprune.policy_file import save_csv, save_front
from autoprune.protocols import Executor, Problem, Task
from autoprune.samplers import build_sampler
from autoprune.setting import Setting, make_folder, prepare, write_event
from autoprune.study import JOURNAL, STUDY_NAME, Record, evaluate_all, locked, search_loop

CONTROL_ARMS = ("uniform", "global")
SEED_TARGETS = 5
"""Budgets between the ends of the range at which each control arm seeds the search, beside the asked ones."""
RUN_FILES = ("job.yaml", JOURNAL, "policy.json", "front.csv", "report.html", "log.jsonl")


def search(
    job: Job | str | Path | Mapping[str, Any], *, task: Task | None = None, out: Path | None = None, fresh: bool = False
) -> Run:
    """Start or resume the search of `job`; iterate the Run for the evaluations as they are told, or call `finish`.

    `task` is a Task made in Python (see `autoprune.task`); the job then needs no `task` section and everything is
    evaluated in this process. `out` is the run folder, by default runs/<job's name>; `fresh` forgets an earlier run.

    Raises:
        InputError: the job is wrong, or the folder belongs to a job that differs (names the keys).
    """
    job = _as_job(job, task)
    folder = Path(out) if out is not None else Path("runs") / job.name
    return Run(job, folder, task, fresh)


class Run:
    """A search under way. Iterating drives it to the end; a run that was driven before replays from its record.

    With `alone` the control arms start the search but stay out of its front and its finals, for a fair comparison.
    """

    def __init__(
        self, job: Job, folder: Path, task: Task | None = None, fresh: bool = False, alone: bool = False
    ) -> None:
        if not fresh:
            _check_same_job(job, folder)
        make_folder(folder)
        self.path, self.stage, self.done, self._alone = folder, "prepare", 0, alone
        self.n_seeds = 1 + len(_seed_targets(job)) * len(CONTROL_ARMS)
        self.total = self.n_seeds + job.search.trials
        self._setting: Setting = prepare(job, folder, task)
        part = job.search
        build_sampler(part.sampler, self._setting.problem, np.random.default_rng(0), part.options)  # fails early
        with locked(folder):
            if fresh:  # not before the new job has proved good
                _forget(folder, self._setting.database_path)
            _write_job(job, folder)
        self._result: tuple[Front, tuple[Mapping[str, Any], ...]] | None = None

    def __iter__(self) -> Iterator[Evaluation]:
        """Evaluations as they are told: control arms, search, finalists."""
        s, self.done, self.total = self._setting, 0, self.n_seeds + self._setting.job.search.trials
        with Record(self.path, s.structure, s.problem.objectives, s.tier, s.identity) as record:
            write_event(self.path, "start", {"groups": len(s.structure), "trials": s.job.search.trials})
            executor = s.executor()
            try:
                for evaluation in self._stages(record, executor):
                    self.done += 1
                    yield evaluation
            finally:
                executor.close()

    def finish(self) -> Run:
        """Drive the run to its end."""
        for _ in self:
            pass
        return self

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
        """The Optuna study of the run, read from its journal."""
        from optuna import load_study
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        backend = JournalFileBackend(str(self.path / JOURNAL))
        return load_study(study_name=STUDY_NAME, storage=JournalStorage(backend))

    def _finished(self) -> tuple[Front, tuple[Mapping[str, Any], ...]]:
        if self._result is None:
            self.finish()
        assert self._result is not None
        return self._result

    def _stages(self, record: Record, executor: Executor) -> Iterator[Evaluation]:
        s, self.stage = self._setting, "control arms"
        labelled = seed_asks(s)
        seeds = []
        for evaluation in evaluate_all(record, executor, labelled, "seed"):
            seeds.append(evaluation)
            yield evaluation
        dense = Policy.dense(s.structure)  # its loss is 0: no start for a search, and no logarithm
        problem = replace(s.problem, seeds=tuple(e for e in seeds if e.ok and e.ask.policy != dense))
        self.stage = "search"
        search_part = s.job.search
        sampler = build_sampler(
            search_part.sampler, problem, np.random.default_rng(search_part.seed), search_part.options
        )
        told = list(seeds)
        asks = search_loop(record, executor, sampler, search_part.trials, search_part.window, first=len(seeds))
        for evaluation in asks:
            told.append(evaluation)
            yield evaluation
        yield from self._finals(record, executor, told)

    def _finals(self, record: Record, executor: Executor, told: list[Evaluation]) -> Iterator[Evaluation]:
        """Re-rank the front on held-back samples, score it on validation, tune the finalists, export."""
        s, controls = self._setting, {} if self._alone else control_policies(self._setting.problem)
        own = told[self.n_seeds :] if self._alone else told

        def evaluated(stage: str, asks: finals.Labelled, done: list[Evaluation]) -> Iterator[Evaluation]:
            self.stage, self.total = stage, self.total + len(asks)
            for evaluation in evaluate_all(record, executor, asks, "final"):
                done.append(evaluation)
                yield evaluation

        held: list[Evaluation] = []
        scored: list[Evaluation] = []
        tuned: list[Evaluation] = []
        final: list[Evaluation] = []
        yield from evaluated("held back", finals.heldback_asks(s, own), held)
        yield from evaluated("validation", finals.validation_asks(s, held, controls), scored)
        yield from evaluated("finalists", finals.finalist_asks(s, scored), tuned)
        winners = finals.winners(s, scored, tuned)
        yield from evaluated("fine-tuned", finals.tuned_asks(s, winners, controls), final)
        full = [(i, e) for i, e in enumerate(told) if e.ask.fraction == 1.0 and e.ask.tier == s.tier]
        trials = {e.ask.policy: i for i, e in reversed(full)}
        front = finals.export_front(s, scored, final, trials)
        rows = finals.summarise(s, finals.Told(front, winners, controls, (*told, *held, *scored, *final)))
        self._result = (front, rows)
        self._export(front, rows)

    def _export(self, front: Front, rows: tuple[Mapping[str, Any], ...]) -> None:
        from autoprune.report import build_report

        self.stage = "done"
        save_front(front, self.path / "policy.json")
        save_csv(front, self.path / "front.csv")
        write_event(self.path, "summary", {"rows": rows})
        build_report(self.path)


def seed_asks(setting: Setting) -> list[tuple[str, Ask]]:
    """The dense policy and the control arms over the budget range, labelled "uniform@0.5"."""
    problem = setting.problem
    asks = [("dense", Ask(Policy.dense(setting.structure), problem.tier))]
    for arm in CONTROL_ARMS:
        strategy = plugins.load("strategies", arm)
        for target in _seed_targets(setting.job):
            asks.append((f"{arm}@{target:g}", Ask(strategy(problem, target), problem.tier)))
    return asks


def control_policies(problem: Problem) -> dict[tuple[str, float], Policy]:
    """The control arms at the asked budgets."""
    return {(arm, at): plugins.load("strategies", arm)(problem, at) for arm in CONTROL_ARMS for at in problem.budget.at}


def _seed_targets(job: Job) -> list[float]:
    budget = job.budget.plain()
    between = [float(t) for t in np.linspace(budget.low, budget.high, SEED_TARGETS)]
    targets = {round(t, 6): t for t in (*between, *budget.at)}  # the asked budgets as they were asked
    return [targets[key] for key in sorted(targets, reverse=True)]


def _as_job(job: Job | str | Path | Mapping[str, Any], task: Task | None) -> Job:
    if isinstance(job, Job):
        return job
    if isinstance(job, Mapping):
        lent = {"task": {"factory": "autoprune:task"}} if task is not None else {}
        return Job.from_dict({**lent, **job})
    return Job.load(job)


def _check_same_job(job: Job, folder: Path) -> None:
    """What may change between calls: trials upwards, the executor; InputError names the rest."""
    if not (folder / "job.yaml").exists():
        return
    before = Job.load(folder / "job.yaml")
    keys = changed_keys(before, job)
    if keys:
        raise InputError(
            f"{folder} holds a run of another job: {', '.join(keys)} differ; trials may grow and executor.* may "
            f"change, for anything else choose another --out or start anew with --fresh"
        )


def _write_job(job: Job, folder: Path) -> None:
    part = folder / f"job.yaml.{os.getpid()}.part"
    part.write_text(job.dump(), encoding="utf-8")
    os.replace(part, folder / "job.yaml")


def _forget(folder: Path, database: Path) -> None:
    """Remove the files of an earlier run, and nothing else."""
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    for path in (folder / "database").glob("*.safetensors"):
        if path != database:
            path.unlink()
