"""Uniform pruning: every group keeps the same share of its atoms, as near to the target as the grids allow."""

from __future__ import annotations

import numpy as np

from autoprune.allocation.budget import Projector, project
from autoprune.policy import IntArray, Policy
from autoprune.protocols import FloatArray, Problem


def uniform(problem: Problem, target: float) -> Policy:
    """One ratio for all groups such that the budget's cost is at most `target` and all limits hold.

    Of blocks, which are there or not, the same share stays, spread over the depth of the network.
    """
    limits = {**problem.budget.limits, problem.budget.cost: target}
    blocks = [i for i, g in enumerate(problem.structure.groups) if g.kind == "block"]
    if not blocks:
        return project(problem.structure, problem.costs, np.ones(len(problem.structure)), limits)
    projector = Projector(problem.structure, problem.costs)
    enough = _enough(len(blocks))
    widths = np.array([w / g.width for g in problem.structure.groups if g.kind != "block" for w in g.grid])
    ratios = np.unique(np.concatenate([[0.0], widths, enough]))

    def positions_at(index: IntArray) -> IntArray:
        found = projector.codec.floor(np.repeat(ratios[index][..., None], len(problem.structure), axis=-1))
        found[..., blocks] = ratios[index][..., None] >= enough - 1e-9
        return found

    start = projector.widest(len(ratios), positions_at, limits)
    return projector.codec.policy(projector.give_back(start, limits, np.ones(len(problem.structure))))


def _enough(n: int) -> FloatArray:
    """For each of `n` blocks in their order the least ratio at which it stays; those of any ratio lie far apart."""
    turns = (np.arange(n) * (5**0.5 - 1) / 2) % 1.0  # multiples of the golden ratio fill a circle evenly
    ranks = np.argsort(np.argsort(turns, kind="stable"), kind="stable")
    return np.asarray((ranks + 0.5) / n)
