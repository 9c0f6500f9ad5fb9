"""The sensitivity table: the loss of the model with one group alone narrowed, at a few widths of every group.

At the `refit` tier (a table from plain recalibration allocates worse, ALGORITHMS 6.2), on a part of the samples; where
that costs more than the search itself, at fewer widths, then at the `stitch` tier.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation, Labelled
from autoprune.files.whole import write_whole
from autoprune.policy import Policy
from autoprune.structure import Structure

Table = Mapping[str, Mapping[int, float]]
"""{group: {width: loss}}, the dense width included."""

HOPELESS = 10.0
"""A width that fails counts as this many times the largest loss of the table."""


@dataclass(frozen=True)
class TablePlan:
    """How a table is measured: at `n_widths` of every group, at `tier`, on this share of the fitness samples.

    Half of them will do: differences between groups are large beside what few samples blur.
    """

    n_widths: int = 5
    tier: Literal["stitch", "refit"] = "refit"
    fraction: float = 0.5

    def said(self) -> str:
        """What a user ought to know of a plan that is less than the usual one; nothing of that."""
        if self == TablePlan():
            return ""
        less = f"{self.n_widths} widths a group, by {self.tier} on {self.fraction:g} of the samples"
        return f"sensitivity table at {less}: it is to cost no more than the search (evaluator.sensitivity)"

    @property
    def identity(self) -> int | tuple[int, str, float]:
        """What its figures depend on; of a usual one the number of widths alone."""
        usual = self == TablePlan(self.n_widths)
        return self.n_widths if usual else (self.n_widths, self.tier, self.fraction)


STITCHED = ((5, 0.5), (3, 0.5), (2, 0.5), (2, 0.25), (1, 0.25), (1, 0.125))
PLANS = (*map(TablePlan, (5, 4, 3, 2)), *(TablePlan(n, "stitch", share) for n, share in STITCHED))
"""From the best to the cheapest; two widths at the `refit` tier tell more than five at the cheaper one."""


def affordable(structure: Structure, price: Callable[[Sequence[Ask]], float], ledger: float) -> TablePlan:
    """The best plan whose asks cost no more than a search's ledger by `price`; the cheapest where none does."""
    plans = (p for p in PLANS if price([ask for _, ask in table_asks(structure, p)]) <= ledger)
    return next(plans, PLANS[-1])


def blank_table(structure: Structure) -> Table:
    """A table of the right shape that says nothing, to try a strategy or a sampler before anything is measured."""
    return {g.name: {g.grid[0]: 1.0, g.width: 0.0} for g in structure.groups}


def table_asks(structure: Structure, plan: TablePlan) -> Labelled:
    """The dense policy, then every group alone at some widths spread evenly over its grid, labelled "conv1=8"."""
    dense = Policy.dense(structure)
    asks = [("dense", Ask(dense, plan.tier, plan.fraction))]
    for group in structure.groups:
        last = len(group.grid) - 1
        chosen = np.unique(np.round(np.linspace(0, last, plan.n_widths + 1)[:-1]).astype(int))
        for width in (group.grid[i] for i in chosen if i < last):
            policy = Policy.of({**dense.as_dict(), group.name: width})
            asks.append((f"{group.name}={width}", Ask(policy, plan.tier, plan.fraction)))
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
        widths = e.ask.policy.as_dict()
        name, width = next((g.name, widths[g.name]) for g in structure.groups if widths[g.name] != g.width)
        table[name][width] = e.loss if math.isfinite(e.loss) else dense.loss + HOPELESS * worst
    return table


def save_table(path: Path, table: Table, plan: TablePlan, evaluations: Sequence[Evaluation]) -> None:
    """Write the table with how it was measured and what it cost, whole or not at all."""
    cost = {"evaluations": len(evaluations), "seconds": sum(e.seconds for e in evaluations)}
    document = {**asdict(plan), **cost, "passes": sum(e.passes for e in evaluations)}
    text = json.dumps({**document, "table": table}, indent=1)
    write_whole(path, text)


def load_table(path: Path) -> Table | None:
    """The table of a file, None where there is none.

    Raises:
        InputError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        groups = _document(path)["table"]
        return {name: {int(w): float(loss) for w, loss in row.items()} for name, row in groups.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no sensitivity table ({error}); remove it and it is measured again") from None


def table_cost(path: Path) -> dict[str, float | None]:
    """What the table of a file cost: its evaluations, passes and seconds; None what the file does not tell."""
    document = _document(path)
    return {name: document.get(name) for name in ("evaluations", "passes", "seconds")}


def _document(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
