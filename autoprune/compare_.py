"""The verb `compare`: strategies and samplers at the same budgets and seeds, side by side, on validation."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autoprune import plugins
from autoprune.errors import InputError, did_you_mean
from autoprune.evaluation import Ask, Evaluation
from autoprune.front import hypervolume
from autoprune.job import Job
from autoprune.protocols import Problem, Strategy
from autoprune.search_ import Run
from autoprune.setting import Setting, make_folder, prepare
from autoprune.study import Record, evaluate_all

COLUMNS = (
    "strategy",
    "budget",
    "seed",
    "macs_ratio",
    "loss",
    "accuracy",
    "evaluations",
    "seconds",
    "hypervolume",
)
LEAST_LOSS = 1e-6
REFERENCE = (1.0, float(np.log(10.0)))
"""Reference point of the hypervolume: macs_ratio 1 and a loss of 10, as its logarithm."""


def compare(
    job: Job | str | Path,
    strategies: Sequence[str] = ("uniform", "global"),
    budgets: Sequence[float] | None = None,
    seeds: int = 3,
    out: Path | None = None,
) -> dict[str, Any]:
    """Run every strategy and sampler for every seed; returns {"rows": [...], "reference": ...} and writes compare.csv.

    A closed-form strategy is one policy a budget; a sampler is one whole search a seed, of the job's trials. Finished
    searches are kept in the folder, so that the same call goes on where it stopped.

    Raises:
        InputError: an unknown name, or a budget outside the reachable range.
    """
    known = (*plugins.names("strategies"), *plugins.names("samplers"))
    for name in strategies:
        if ":" not in name and name not in known:
            raise InputError(f"--strategies: unknown name {name!r}; {did_you_mean(name, known)}")
    job = Job.load(job) if isinstance(job, str | Path) else job
    if not strategies or seeds < 1 or (budgets is not None and not budgets):
        raise InputError("compare needs at least one strategy, one budget and one seed")
    folder = Path(out) if out is not None else Path("runs") / f"{job.name}-compare"
    make_folder(folder)
    at = tuple(budgets) if budgets is not None else job.budget.plain().at
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for name in strategies:
            seeded = _seeded(job, name, seed, at)
            place = folder / f"{name.replace(':', '.')}-seed{seed}-at{'-'.join(f'{b:g}' for b in at)}"
            run = _closed_form if name in plugins.names("strategies") else _searched
            rows += [{"strategy": name, "seed": seed, **row} for row in run(seeded, name, at, place)]
    _write(folder, rows)
    return {"rows": [{c: row.get(c) for c in COLUMNS} for row in rows], "reference": _reference()}


def _seeded(job: Job, name: str, seed: int, at: Sequence[float]) -> Job:
    """The job with this seed and sampler, asked at these budgets."""
    plain = job.plain()
    budget = job.budget.plain()
    span = [min(budget.low, *at), max(budget.high, *at)]
    plain["budget"] = {**plain["budget"], budget.cost: span, "at": list(at)}
    plain["search"] = {**plain["search"], "seed": job.search.seed + seed}
    plain["evaluator"] = {**plain["evaluator"], "finalists": 0}
    if name not in plugins.names("strategies"):
        plain["search"]["sampler"] = name
    return Job.from_dict(plain)


def _closed_form(job: Job, name: str, at: Sequence[float], place: Path) -> Iterable[dict[str, Any]]:
    setting = prepare(job, place)
    strategy: Strategy = plugins.load("strategies", name)
    asks = [(f"{name}@{b:g}", _on_validation(setting, strategy, b)) for b in at]
    executor = setting.executor()
    try:
        identity = setting.identity
        with Record(place, setting.structure, setting.problem.objectives, setting.tier, identity) as record:
            done = list(evaluate_all(record, executor, asks, "final"))
    finally:
        executor.close()
    volume = _volume(job, [(e.costs["macs"], e.loss) for e in done if e.ok])
    for budget, e in zip(at, done, strict=True):
        yield _row(budget, e, 1, e.seconds, volume)


def _on_validation(setting: Setting, strategy: Strategy, budget: float) -> Ask:
    problem: Problem = setting.problem
    return Ask(strategy(problem, budget), problem.tier, split="validation")


def _searched(job: Job, name: str, at: Sequence[float], place: Path) -> Iterable[dict[str, Any]]:
    """The sampler's own points: those of the control arms, which seed every run, do not count for it."""
    run = Run(job, place, alone=True).finish()
    trials = [t.user_attrs for t in run.study.get_trials(deepcopy=False)]
    evaluations, seconds = sum(a["passes"] > 0 for a in trials), sum(a["seconds"] for a in trials)
    volume = _volume(job, [(p.ratio("macs"), p.metrics["validation"]["loss"]) for p in run.front])
    for budget in at:
        try:
            point = run.front.select(f"{job.budget.plain().cost}={budget!r}")
        except InputError:  # the search left no point within this budget: an empty row says so
            yield {"budget": budget, "evaluations": evaluations, "seconds": seconds, "hypervolume": volume}
            continue
        scores = point.metrics["validation"]
        yield {
            "budget": budget,
            "macs_ratio": point.ratio("macs"),
            "loss": scores["loss"],
            "accuracy": scores.get("accuracy"),
            "evaluations": evaluations,
            "seconds": seconds,
            "hypervolume": volume,
        }


def _row(budget: float, e: Evaluation, evaluations: int, seconds: float, volume: float) -> dict[str, Any]:
    return {
        "budget": budget,
        "macs_ratio": e.costs.get("macs"),
        "loss": e.loss if e.ok else None,
        "accuracy": e.metrics.get("accuracy"),
        "evaluations": evaluations,
        "seconds": seconds,
        "hypervolume": volume,
    }


def _volume(job: Job, points: Sequence[tuple[float, float]]) -> float:
    """Hypervolume of (macs_ratio, log-loss) up to the reference point; a task metric counts as it is."""
    fidelity = isinstance(job.objectives.loss, str)
    losses = [np.log(max(loss, LEAST_LOSS)) if fidelity else loss for _, loss in points]
    values = np.array([[ratio, loss] for (ratio, _), loss in zip(points, losses, strict=True)]).reshape(-1, 2)
    return hypervolume(values, np.array(REFERENCE))


def _reference() -> dict[str, Any]:
    return {"macs_ratio": REFERENCE[0], "log_loss": REFERENCE[1], "of": "the front on validation"}


def _write(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    draft = folder / f"compare.csv.{os.getpid()}.part"
    with draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(draft, folder / "compare.csv")
    document = {"reference": _reference(), "rows": list(rows)}
    (folder / "compare.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
