"""OWL: one ratio for all groups, but more for those with many outliers among their atoms' scores."""

from __future__ import annotations

import numpy as np

from autoprune.allocation.budget import normalised, project
from autoprune.matrices import WEIGHT
from autoprune.policy import Policy
from autoprune.protocols import FloatArray, Problem
from autoprune.strategies._declared import declares
from autoprune.structure import Group

M = 5.0
"""An outlier scores above M times its group's mean. The paper takes 5 or 7 for single weights, whose scores have long
tails (by Wanda); of whole atoms few get as far: none in a group of M atoms or fewer, and none at all by their norms as
a rule."""
LAMBDA = 0.08
"""The paper's: no ratio is further than this from the middle."""


@declares(kinds=("channel", "head", "kv_group", "neuron", "weight"))  # a block is one atom, and no outlier
def owl(problem: Problem, target: float) -> Policy:
    """Outlier weighed layerwise sparsity (Yin et al. 2024) on the scores of any criterion, within all limits.

    The same as uniform where all groups have the same share of outliers, such as none.

    Raises:
        InputError: a group lacks finite scores, or the budget is out of reach.
    """
    limits = {**problem.budget.limits, problem.budget.cost: target}
    scores = zip(problem.structure, normalised(problem.structure, problem.scores).values(), strict=True)
    shares = np.array([np.mean(s > M * _mean(group, s)) for group, s in scores], dtype=np.float64)
    return project(problem.structure, problem.costs, owl_ratios(shares), limits)


def _mean(group: Group, scores: FloatArray) -> float:
    """Of normalised scores, where only weights have another one than 1: theirs compare over all matrices."""
    return float(np.mean(scores, dtype=np.float64)) if group.kind == WEIGHT else 1.0


def owl_ratios(shares: FloatArray) -> FloatArray:
    """Shares of outliers [groups] -> ratios [groups] in [0, 2 * LAMBDA], linear in them, up to one common shift.

    The paper shifts them to the asked mean ratio; here the projection shifts them to the budget.
    """
    return np.asarray(2 * LAMBDA * (shares - shares.min()) / (np.ptp(shares) or 1.0))
