"""Uniform pruning: every group keeps the same share of its atoms, as near to the target as the grids allow."""

from __future__ import annotations

import numpy as np

from autoprune.allocation.budget import project
from autoprune.policy import Policy
from autoprune.protocols import Problem


def uniform(problem: Problem, target: float) -> Policy:
    """One ratio for all groups such that the budget's cost is at most `target` and all limits hold."""
    limits = {**problem.budget.limits, problem.budget.cost: target}
    return project(problem.structure, problem.costs, np.ones(len(problem.structure)), limits)
