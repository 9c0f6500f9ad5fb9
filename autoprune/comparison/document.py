"""What a comparison says: rows a seed (compare.csv), means and spreads, verdicts, fronts (compare.json)."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from autoprune.allocation.sensitivity import table_cost
from autoprune.comparison.arm import Cell, Scored
from autoprune.comparison.checks import is_closed_form
from autoprune.comparison.verdict import RULE, judge
from autoprune.pareto import reference_point
from autoprune.run.setting import Setting

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
ABOUT = {
    "evaluations": "those of the cell that really ran (repeats are free), its scoring on validation included; the "
    "sensitivity table and the choice of the tier, which all cells share, are not",
    "seconds": "of these evaluations, summed, whatever the number of workers",
    "ledger": "what the search was charged, in full evaluations at the fitness tier",
    "seeds": "a closed-form strategy is the same for every seed: measured once, its figures stand at each seed",
    "options": "search.options go to the job's own sampler; every other one has its defaults",
    "chosen": "a sampler's point at a budget is its front's point of least loss on fitness and held-back samples "
    "together, scored on validation",
    "spread": "standard deviation over the seeds; intervals are bootstraps over the validation samples, at 95 %",
}
Cells = Mapping[tuple[str, int], Cell]


def document_of(setting: Setting, cells: Cells, budgets: Sequence[float]) -> dict[str, Any]:
    """Everything that compare.json holds; `cells` by strategy and seed, in the order in which they were asked for."""
    names, seeds = list(dict.fromkeys(name for name, _ in cells)), list(dict.fromkeys(seed for _, seed in cells))
    ordered = [cells[name, seed] for name in names for seed in seeds]
    table = None if setting.problem.table is None else table_cost(setting.table_path)  # where a cell needed one
    return {
        "rows": [_row(cell, i) for name in names for i in range(len(budgets)) for cell in _of(cells, name, seeds)],
        "summary": [_summary(_of(cells, name, seeds), i) for i in range(len(budgets)) for name in names],
        "verdicts": [asdict(v) for v in judge(cells, names, budgets, seeds)],
        "rule": RULE,
        "reference": {
            **dict(zip(("macs_ratio", "log_loss"), reference_point(1), strict=True)),
            "of": "the front on validation",
        },
        "about": ABOUT,
        **{"cost": setting.problem.budget.cost, "tier": setting.tier, "trials": setting.job.search.trials},
        **{"log": setting.job.objectives.logarithmic, "table": table, "dense": dict(ordered[0].dense)},
        "cells": [_facts(cell) for cell in ordered],
    }


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV; what a seed did not reach is empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _of(cells: Cells, name: str, seeds: Sequence[int]) -> list[Cell]:
    return [cells[name, seed] for seed in seeds]


def _row(cell: Cell, i: int) -> dict[str, Any]:
    point = cell.chosen[i]
    figures = (None, None, None) if point is None else (point.macs_ratio, point.loss, point.accuracy)
    work = (cell.evaluations, cell.seconds, cell.hypervolume)
    return dict(zip(COLUMNS, (cell.strategy, cell.budgets[i], cell.seed, *figures, *work), strict=True))


def _summary(cells: Sequence[Cell], i: int) -> dict[str, Any]:
    """Mean and spread over the seeds of one strategy at one budget; None where a seed reached nothing."""
    points = [cell.chosen[i] for cell in cells]
    reached = [p for p in points if p is not None]
    row: dict[str, Any] = {"strategy": cells[0].strategy, "budget": cells[0].budgets[i], "seeds": len(cells)}
    row |= {"seeds_reached": len(reached), "closed_form": is_closed_form(cells[0].strategy)}
    row |= _mean("macs_ratio", [p.macs_ratio for p in reached]) | _mean("loss", [p.loss for p in reached])
    row |= _mean("accuracy", [p.accuracy for p in reached if p.accuracy is not None])
    row |= _mean("hypervolume", [cell.hypervolume for cell in cells])
    row["evaluations"] = float(np.mean([cell.evaluations for cell in cells]))
    row["seconds"] = float(np.mean([cell.seconds for cell in cells]))
    return row


def _mean(name: str, values: Sequence[float]) -> dict[str, float | None]:
    mean = float(np.mean(values)) if values else None
    return {name: mean, f"{name}_sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def _facts(cell: Cell) -> dict[str, Any]:
    """A cell without its samples: what it cost, its chosen points and its front with intervals."""
    facts = {"strategy": cell.strategy, "seed": cell.seed, "key": cell.key, "evaluations": cell.evaluations}
    facts |= {"passes": cell.passes, "ledger": cell.ledger, "seconds": cell.seconds, "hypervolume": cell.hypervolume}
    chosen = {f"{b:g}": None if p is None else _point(p) for b, p in zip(cell.budgets, cell.chosen, strict=True)}
    return {**facts, "chosen": chosen, "front": [_point(p) for p in cell.front]}


def _point(point: Scored) -> dict[str, Any]:
    return {name: value for name, value in asdict(point).items() if name != "sample_losses"}
