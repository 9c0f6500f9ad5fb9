"""What a comparison says: rows a seed (compare.csv), means and spreads, verdicts, fronts (compare.json)."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from autoprune.comparison.arm import Arm, Scored
from autoprune.comparison.checks import is_closed_form
from autoprune.comparison.verdict import RULE, judge
from autoprune.costs._latency_words import time_words
from autoprune.pareto import reference_point
from autoprune.protocols import Problem
from autoprune.run.timed import time_parts

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
    "cost",
    "cost_ratio",
    "metric",
    "value",
)
TIMED = "latency_ratio"
"""A column beside them where latencies were measured."""
ABOUT = {
    "evaluations": "those of the arm that really ran (repeats are free), its scoring on validation included; the "
    "sensitivity table and the choice of the tier, which all arms share, are not",
    "seconds": "of these evaluations, summed, whatever the number of workers",
    "ledger": "what the search was charged, in full evaluations at the fitness tier",
    "seeds": "a closed-form strategy is the same for every seed: measured once, its figures stand at each seed",
    "options": "search.options go to the job's own sampler; every other one has its defaults",
    "chosen": "a sampler's point at a budget is its front's point of least loss on fitness and held-back samples "
    "together, scored on validation",
    "spread": "standard deviation over the seeds; intervals are bootstraps over the validation samples, at 95 %",
}
Arms = Mapping[tuple[str, int], Arm]


def document_of(
    arms: Arms,
    budgets: Sequence[float],
    controls: Sequence[str],
    problem: Problem,
    *,
    directions: Mapping[str, str],
    table: Mapping[str, float | None] | None,
) -> dict[str, Any]:
    """Everything that compare.json holds; `arms` by strategy and seed, in the order in which they were asked for.

    `controls` are those of the arms that the others are judged against, `directions` say which way a metric is better,
    `table` is what the sensitivity table took that they share; None where no arm needed one.
    """
    cost, metric = problem.budget.cost, next(iter(arms.values())).metric
    unchanging = {n for n, _ in arms if is_closed_form(n) and problem.tier != "tune"}  # a fine-tune has its seed
    names, seeds = list(dict.fromkeys(name for name, _ in arms)), list(dict.fromkeys(seed for _, seed in arms))
    timed = any(p is not None and p.latency is not None for arm in arms.values() for p in arm.chosen)
    ordered = [arms[name, seed] for name in names for seed in seeds]
    return {
        "rows": [
            _row(arm, i, cost, timed) for name in names for i in range(len(budgets)) for arm in _of(arms, name, seeds)
        ],
        "summary": [_summary(_of(arms, name, seeds), i) for i in range(len(budgets)) for name in names],
        "verdicts": [asdict(v) for v in judge(arms, budgets, controls, unchanging)],
        "rule": RULE,
        "reference": {
            **dict(
                zip((f"{cost}_ratio", "log_loss" if problem.logarithmic else "loss"), reference_point(1), strict=True)
            ),
            "of": "the front on validation",
        },
        "about": ABOUT,
        **{
            "cost": cost,
            "metric": metric,
            "direction": directions.get(metric or "", "maximize"),
            "controls": list(controls),
        },
        **{"tier": problem.tier, "trials": problem.n_trials},
        **{"log": problem.logarithmic, "table": table, "dense": dict(ordered[0].dense)},
        "rest": _rest(ordered, controls, problem),
        "cells": [_facts(arm) for arm in ordered],
    }


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV; what a seed did not reach is empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, (*COLUMNS, *([TIMED] if any(TIMED in row for row in rows) else [])))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _of(arms: Arms, name: str, seeds: Sequence[int]) -> list[Arm]:
    return [arms[name, seed] for seed in seeds]


def _row(arm: Arm, i: int, cost: str, timed: bool) -> dict[str, Any]:
    point = arm.chosen[i]
    value = None if point is None else point.value
    accuracy = value if arm.metric == "accuracy" else None
    figures = (None, None, None) if point is None else (point.macs_ratio, point.loss, accuracy)
    work = (arm.evaluations, arm.seconds, arm.hypervolume)
    asked = (cost, None if point is None else point.cost_ratio, arm.metric, value)
    row = dict(zip(COLUMNS, (arm.strategy, arm.budgets[i], arm.seed, *figures, *work, *asked), strict=True))
    return {**row, TIMED: _latency_ratio(point)} if timed else row


def _latency_ratio(point: Scored | None) -> float | None:
    return None if point is None or point.latency is None else point.latency["ratio"]


def _rest(arms: Sequence[Arm], controls: Sequence[str], problem: Problem) -> str | None:
    """Where the time goes, at the point nearest to half of the MACs of what is no control arm, if anything is."""
    points = [(arm.strategy in controls, p) for arm in arms for p in arm.chosen if p is not None]
    told = [(control, p) for control, p in points if p.latency is not None]
    if not told:
        return None
    _, point = min(told, key=lambda pair: (pair[0], abs(pair[1].macs_ratio - 0.5)))
    assert point.latency is not None
    return time_words(point.macs_ratio, point.latency, time_parts(problem))


def _summary(arms: Sequence[Arm], i: int) -> dict[str, Any]:
    """Mean and spread over the seeds of one strategy at one budget; None where a seed reached nothing."""
    points = [arm.chosen[i] for arm in arms]
    reached = [p for p in points if p is not None]
    row: dict[str, Any] = {"strategy": arms[0].strategy, "budget": arms[0].budgets[i], "seeds": len(arms)}
    row |= {"seeds_reached": len(reached), "closed_form": is_closed_form(arms[0].strategy)}
    row |= _mean("macs_ratio", [p.macs_ratio for p in reached]) | _mean("loss", [p.loss for p in reached])
    row |= _mean("cost_ratio", [p.cost_ratio for p in reached])
    values = [p.value for p in reached if p.value is not None]
    row |= _mean("value", values) | _mean("accuracy", values if arms[0].metric == "accuracy" else [])
    row |= _mean(TIMED, [found for p in points if (found := _latency_ratio(p)) is not None])
    row |= _mean("hypervolume", [arm.hypervolume for arm in arms])
    row["evaluations"] = float(np.mean([arm.evaluations for arm in arms]))
    row["seconds"] = float(np.mean([arm.seconds for arm in arms]))
    return row


def _mean(name: str, values: Sequence[float]) -> dict[str, float | None]:
    mean = float(np.mean(values)) if values else None
    return {name: mean, f"{name}_sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def _facts(arm: Arm) -> dict[str, Any]:
    """An arm without its samples: what it cost, its chosen points and its front with intervals."""
    facts = {"strategy": arm.strategy, "seed": arm.seed, "key": arm.key, "evaluations": arm.evaluations}
    facts |= {"passes": arm.passes, "ledger": arm.ledger, "seconds": arm.seconds, "hypervolume": arm.hypervolume}
    chosen = {f"{b:g}": None if p is None else _point(p) for b, p in zip(arm.budgets, arm.chosen, strict=True)}
    return {**facts, "chosen": chosen, "front": [_point(p) for p in arm.front]}


def _point(point: Scored) -> dict[str, Any]:
    shown = {name: value for name, value in asdict(point).items() if name != "sample_losses"}
    return {name: value for name, value in shown.items() if name != "latency" or value is not None}
