"""One threshold over the scores of all atoms of all groups, at which a budget is met."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from autoprune.allocation.budget import Projector
from autoprune.matrices import WEIGHT
from autoprune.policy import IntArray, Policy
from autoprune.protocols import FloatArray, Problem
from autoprune.structure import Group


def above_threshold(problem: Problem, target: float, ascending: Iterable[FloatArray]) -> Policy:
    """Atoms at or above one threshold stay, such that the budget's cost is at most `target` and all limits hold.

    Args:
        problem: its scores decide who gets what is left once no common threshold fits any more.
        target: upper bound on `problem.budget.cost`, as a ratio to dense.
        ascending: for each group in the order of the structure its atoms' scores [width], ascending; comparable
            between groups. They are taken one by one, and not kept whole where they are of weights.

    Raises:
        InputError: the target or a limit lies below what the grids can reach.
    """
    limits = {**problem.budget.limits, problem.budget.cost: target}
    projector = Projector(problem.structure, problem.costs, problem.scores)
    ranked = [_Ranked(group, scores) for group, scores in zip(problem.structure, ascending, strict=True)]
    thresholds = np.unique(np.concatenate([*(r.scores for r in ranked), [np.inf]]))[::-1]  # falling: ever wider

    def positions_at(index: IntArray) -> IntArray:
        dropped = np.stack([r.dropped(thresholds[index]) for r in ranked], axis=-1)
        return projector.codec.floor(1 - dropped / projector.codec.dense)

    start = projector.widest(len(thresholds), positions_at, limits)
    return projector.codec.policy(projector.give_back(start, limits))


class _Ranked:
    """How many atoms of a group lie below a threshold; of weights up to the grid.

    Of a matrix only the scores are held at which another width begins: between them nothing changes.
    """

    def __init__(self, group: Group, ascending: FloatArray) -> None:
        least = group.width - np.array(group.grid[::-1])
        self.scores = ascending[least] if group.kind == WEIGHT else ascending
        self._counts = np.append(least, least[-1]) if group.kind == WEIGHT else None

    def dropped(self, thresholds: FloatArray) -> IntArray:
        """Thresholds [k] -> atoms [k] that score less."""
        below = np.searchsorted(self.scores, thresholds, side="left")
        return np.asarray(below if self._counts is None else self._counts[below])
