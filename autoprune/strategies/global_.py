"""Global pruning: one threshold over all atoms' scores, each group's scores divided by their mean."""

from __future__ import annotations

import numpy as np

from autoprune.allocation.budget import normalised
from autoprune.policy import Policy
from autoprune.protocols import Problem
from autoprune.strategies._thresholds import above_threshold


def global_(problem: Problem, target: float) -> Policy:
    """Atoms above one threshold stay, such that the budget's cost is at most `target` and all limits hold.

    Weights compare by their scores as they are: by `l1_norm` these are the magnitudes of
    `torch.nn.utils.prune.global_unstructured`.
    """
    ascending = (np.sort(s) for s in normalised(problem.structure, problem.scores).values())
    return above_threshold(problem, target, ascending)
