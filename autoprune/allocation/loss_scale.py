"""The scale on which a search compares losses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from autoprune.protocols import Problem

LEAST_LOSS = 1e-9  # below this, differences of losses are rounding


@dataclass(frozen=True)
class LossScale:
    """Losses compare by their logarithm, or by multiples of `spread` where there is one."""

    spread: float | None = None

    @property
    def logarithmic(self) -> bool:
        return self.spread is None

    def __call__(self, loss: float) -> float:
        return math.log(max(loss, LEAST_LOSS)) if self.spread is None else loss / self.spread


def loss_scale(problem: Problem) -> LossScale:
    """Logarithmic for a fidelity that is positive, else the spread of the seeds' losses (1 where there are none)."""
    losses = [e.loss for e in problem.seeds if e.ok]
    if problem.logarithmic and min(losses, default=1.0) > 0:
        return LossScale()
    return LossScale(max(float(np.std(losses)), LEAST_LOSS) if len(losses) > 1 else 1.0)
