"""LAMP: one threshold over all atoms, each scored by its share of what its group holds without the weaker ones."""

from __future__ import annotations

import numpy as np

from autoprune.allocation.budget import normalised
from autoprune.policy import Policy
from autoprune.protocols import FloatArray, Problem
from autoprune.strategies._thresholds import above_threshold


def lamp(problem: Problem, target: float) -> Policy:
    """Layer-adaptive magnitude pruning (Lee et al. 2021) on the scores of any criterion, within all limits."""
    scores = normalised(problem.structure, problem.scores).values()
    return above_threshold(problem, target, (lamp_scores(s) for s in scores))


def lamp_scores(scores: FloatArray) -> FloatArray:
    """Scores [width] in any order -> LAMP scores [width], ascending: s_i^2 / sum of s_j^2 over all j not below i."""
    s = np.maximum(np.sort(scores), 0.0).astype(np.float64)  # sums over millions of weights
    squares = (s / max(float(s[-1]), np.finfo(np.float64).tiny)) ** 2
    remaining = np.cumsum(squares[::-1])[::-1]
    shares = np.divide(squares, remaining, out=np.ones_like(squares), where=remaining > 0)
    return np.maximum.accumulate(shares)  # ascending as the formula has it, whatever the last bit says
