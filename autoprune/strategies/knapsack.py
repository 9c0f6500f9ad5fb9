"""Knapsack: the least sum of predicted loss increases over the sensitivity table within the budget."""

from __future__ import annotations

from autoprune.allocation.knapsack import Allocator, penalties
from autoprune.codec import Codec
from autoprune.policy import Policy
from autoprune.protocols import Problem
from autoprune.strategies._declared import declares


@declares(uses_table=True)
def knapsack(problem: Problem, target: float) -> Policy:
    """Widths of (nearly) the least summed penalties whose budget cost is at most `target`, within all limits.

    Raises:
        InputError: there is no sensitivity table, or the budget is out of reach.
    """
    limits = {**problem.budget.limits, problem.budget.cost: target}
    prices = penalties(problem, "strategy knapsack")
    positions = Allocator(problem.structure, problem.costs).solve(prices, limits)
    return Codec(problem.structure).policy(positions)
