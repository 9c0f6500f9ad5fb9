"""The sensitivity table: the loss of the model with one group alone narrowed, at a few widths of every group.

At the `refit` tier (a table from plain recalibration allocates worse, ALGORITHMS 6.2), on a part of the samples.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.policy import Policy
from autoprune.structure import Structure

Table = Mapping[str, Mapping[int, float]]
"""{group: {width: loss}}, the dense width included."""

TIER: Any = "refit"
FRACTION = 0.5
"""Share of the fitness samples: differences between groups are large beside what few samples blur."""
HOPELESS = 10.0
"""A width that fails counts as this many times the largest loss of the table."""


def table_asks(structure: Structure, n_widths: int) -> list[tuple[str, Ask]]:
    """The dense policy, then every group alone at `n_widths` widths spread evenly over its grid, labelled "conv1=8"."""
    dense = Policy.dense(structure)
    asks = [("dense", Ask(dense, TIER, FRACTION))]
    for group in structure.groups:
        last = len(group.grid) - 1
        chosen = np.unique(np.round(np.linspace(0, last, n_widths + 1)[:-1]).astype(int))
        for width in (group.grid[i] for i in chosen if i < last):
            policy = Policy.of({**dense.as_dict(), group.name: width})
            asks.append((f"{group.name}={width}", Ask(policy, TIER, FRACTION)))
    return asks


def table_of(structure: Structure, evaluations: Sequence[Evaluation]) -> dict[str, dict[int, float]]:
    """The table from the answers to `table_asks`; a width that failed counts as far worse than all others.

    Raises:
        InputError: the dense model itself fails.
    """
    dense, *narrowed = evaluations
    if not dense.ok:
        raise InputError(f"the dense model cannot be evaluated: {dense.error}")
    worst = max((abs(e.loss - dense.loss) for e in narrowed if e.ok), default=1.0)
    table = {g.name: {g.width: dense.loss} for g in structure.groups}
    for e in narrowed:
        name, width = next((g.name, w) for g, w in _widths(structure, e.ask.policy) if w != g.width)
        table[name][width] = e.loss if math.isfinite(e.loss) else dense.loss + HOPELESS * worst
    return table


def measured_table(
    structure: Structure, n_widths: int, path: Path, evaluate: Callable[[list[tuple[str, Ask]]], Iterable[Evaluation]]
) -> Table:
    """The table in the file `path`, else measured by `evaluate` and saved there.

    Raises:
        InputError: the dense model itself fails.
    """
    found = load_table(path)
    if found is not None:
        return found
    evaluations = list(evaluate(table_asks(structure, n_widths)))
    table = table_of(structure, evaluations)
    save_table(path, table, evaluations)
    return table


def save_table(path: Path, table: Table, evaluations: Sequence[Evaluation]) -> None:
    """Write the table with what it cost, whole or not at all."""
    cost = {"evaluations": len(evaluations), "seconds": sum(e.seconds for e in evaluations)}
    document = {"tier": TIER, "fraction": FRACTION, **cost, "passes": sum(e.passes for e in evaluations)}
    text = json.dumps({**document, "table": table}, indent=1)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def load_table(path: Path) -> Table | None:
    """The table of a file, None where there is none.

    Raises:
        InputError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))["table"]
        return {name: {int(w): float(loss) for w, loss in row.items()} for name, row in groups.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no sensitivity table ({error}); remove it and it is measured again") from None


def _widths(structure: Structure, policy: Policy) -> Iterable[tuple[Any, int]]:
    widths = policy.as_dict()
    return ((g, widths[g.name]) for g in structure.groups)
