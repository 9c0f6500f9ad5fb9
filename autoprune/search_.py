"""The verb `search`: control arms, the search loop, finalists, the exported front. Everything finished is on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from autoprune import plugins
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.finals import export_front, final_asks, summarise, tune_asks
from autoprune.front import Front
from autoprune.job import Job, changed_keys
from autoprune.policy import Policy
from autoprune.policy_file import save_csv, save_front
from autoprune.protocols import Problem, Task
from autoprune.samplers import build_sampler
from autoprune.setting import Setting, prepare, write_event
from autoprune.study import JOURNAL, STUDY_NAME, Record, evaluate_all, search_loop

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
    if fresh:
        _forget(folder)
    return Run(job, folder, task)


class Run:
    """A search under way. Iterating drives it to the end; a run that was driven before replays from its record."""

    def __init__(self, job: Job, folder: Path, task: Task | None) -> None:
        _check_same_job(job, folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.stage, self.done = folder, "prepare", 0
        self.total = 1 + len(_seed_targets(job)) * len(CONTROL_ARMS) + job.search.trials
        self._setting: Setting = prepare(job, folder, task)
        _write_job(job, folder)
        self._result: tuple[Front, tuple[Mapping[str, Any], ...]] | None = None

    def __iter__(self) -> Iterator[Evaluation]:
        """Evaluations as they are told: control arms, search, finalists."""
        s = self._setting
        with Record(self.path, s.structure, s.problem.objectives, s.tier) as record:
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

    def _stages(self, record: Record, executor: Any) -> Iterator[Evaluation]:
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

    def _finals(self, record: Record, executor: Any, told: list[Evaluation]) -> Iterator[Evaluation]:
        """Score the front and the control arms on validation, tune the finalists, export."""
        s, self.stage = self._setting, "validation"
        controls = control_policies(s.problem)
        labelled = final_asks(s, told, controls)
        self.total += len(labelled)
        scored = []
        for evaluation in evaluate_all(record, executor, labelled, "final"):
            scored.append(evaluation)
            yield evaluation
        self.stage = "finalists"
        tuning = tune_asks(s, scored, controls)
        self.total += len(tuning)
        tuned = []
        for evaluation in evaluate_all(record, executor, tuning, "final"):
            tuned.append(evaluation)
            yield evaluation
        full = [(i, e.ask) for i, e in enumerate(told) if e.ask.fraction == 1.0 and e.ask.tier == s.tier]
        trials = {ask.policy: i for i, ask in reversed(full)}
        front = export_front(s, scored, tuned, trials)
        rows = summarise(s, front, scored, tuned, controls)
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
    between = np.linspace(budget.low, budget.high, SEED_TARGETS)
    return sorted({round(float(t), 6) for t in (*between, *budget.at)}, reverse=True)


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


def _forget(folder: Path) -> None:
    """Remove the files of an earlier run, and nothing else."""
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    for path in (folder / "database").glob("*.safetensors"):
        path.unlink()
