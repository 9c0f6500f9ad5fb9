"""FastNAS: every group as narrow as one common bound on its predicted loss increase allows."""

from __future__ import annotations

import numpy as np

from autoprune.allocation.budget import Projector
from autoprune.allocation.knapsack import penalties
from autoprune.policy import IntArray, Policy
from autoprune.protocols import Problem
from autoprune.strategies._declared import declares


@declares(uses_table=True)
def fastnas(problem: Problem, target: float) -> Policy:
    """The least largest drop over the sensitivity table within the budget (NVIDIA Model Optimizer's FastNAS rule).

    Raises:
        InputError: there is no sensitivity table, or the budget is out of reach.
    """
    limits = {**problem.budget.limits, problem.budget.cost: target}
    projector = Projector(problem.structure, problem.costs, problem.scores)
    rising = [-p for p in penalties(problem, "strategy fastnas")]
    bounds = np.unique(np.concatenate(rising))  # minus tau, rising: ever wider

    def positions_at(index: IntArray) -> IntArray:
        return np.stack([np.searchsorted(p, bounds[index], side="left") for p in rising], axis=-1)

    start = projector.widest(len(bounds), positions_at, limits)
    return projector.codec.policy(projector.give_back(start, limits))
