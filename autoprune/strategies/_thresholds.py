"""One threshold over the scores of all atoms of all groups, at which a budget is met."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoprune.allocation.budget import Projector
from autoprune.policy import IntArray, Policy
from autoprune.protocols import FloatArray, Problem


def above_threshold(problem: Problem, target: float, ascending: Sequence[FloatArray]) -> Policy:
    """Atoms at or above one threshold stay, such that the budget's cost is at most `target` and all limits hold.

    Args:
        problem: its scores decide who gets what is left once no common threshold fits any more.
        target: upper bound on `problem.budget.cost`, as a ratio to dense.
        ascending: for each group in the order of the structure its atoms' scores [width], ascending; comparable
            between groups.

    Raises:
        InputError: the target or a limit lies below what the grids can reach.
    """
    limits = {**problem.budget.limits, problem.budget.cost: target}
    projector = Projector(problem.structure, problem.costs, problem.scores)
    thresholds = np.unique(np.concatenate([*ascending, [np.inf]]))[::-1]  # falling: ever wider

    def positions_at(index: IntArray) -> IntArray:
        dropped = np.stack([np.searchsorted(s, thresholds[index], side="left") for s in ascending], axis=-1)
        return projector.codec.floor(1 - dropped / projector.codec.dense)

    start = projector.widest(len(thresholds), positions_at, limits)
    return projector.codec.policy(projector.give_back(start, limits))
