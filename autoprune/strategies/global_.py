"""Global pruning: one threshold over all atoms' scores, each group's scores divided by their mean."""

from __future__ import annotations

import numpy as np

from autoprune.budget import Projector, normalised
from autoprune.policy import IntArray, Policy
from autoprune.protocols import Problem


def global_(problem: Problem, target: float) -> Policy:
    """Atoms above one threshold stay, such that the budget's cost is at most `target` and all limits hold."""
    limits = {**problem.budget.limits, problem.budget.cost: target}
    projector = Projector(problem.structure, problem.costs, problem.scores)
    ascending = [np.sort(s) for s in normalised(problem.structure, problem.scores).values()]
    thresholds = np.unique(np.concatenate([*ascending, [np.inf]]))[::-1]  # falling: ever wider

    def positions_at(index: IntArray) -> IntArray:
        dropped = np.stack([np.searchsorted(s, thresholds[index], side="left") for s in ascending], axis=-1)
        return projector.codec.floor(1 - dropped / projector.codec.dense)

    start = projector.widest(len(thresholds), positions_at, limits)
    return projector.codec.policy(projector.give_back(start, limits))
