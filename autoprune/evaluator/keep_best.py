"""A fine-tune never returns less than it was given: the best weights are kept, the peak rate is found (ALGORITHMS 8a).

Both are judged on samples that were not trained on. The evaluator takes the held-back quarter of the calibration split:
no repair has seen it, no sampler is told of it, and what is reported comes from validation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.protocols import Progress

CHECKS = 4
"""How often a course is scored, evenly spaced, beside its start."""
PROBE_STEPS = 15
"""A whole short schedule: fewer tell a rate that is too high from a good one no better than chance."""
FACTOR = 3.0
LOWEST, HIGHEST = -5, 1
"""How far from the usual rate the peak may lie, in powers of the factor."""


@dataclass(frozen=True)
class Kept:
    """The held-back losses of the start and of what was kept, and the step that it comes from (0: the start)."""

    start: float
    loss: float
    step: int

    @property
    def helped(self) -> bool:
        """Whether training made it better."""
        return self.step > 0


def checks(steps: int) -> tuple[int, ...]:
    """The steps after which a course is scored; the last is its end."""
    return tuple(sorted({max(1, round(steps * k / CHECKS)) for k in range(1, CHECKS + 1)})) if steps else ()


def scorings(steps: int) -> int:
    """How often held-back samples go through the model for a course: at its start and at each check."""
    return len(checks(steps)) + 1 if steps else 0


def keep_best(model: nn.Module, training: Iterable[Progress], score: Callable[[], float], stops: Iterable[int]) -> Kept:
    """Train `model` in place; it is left with the weights of least `score`, those of its start included.

    It is scored when a step of `stops` is done. A training whose loss is no longer finite ends there.
    """
    start = best = score()
    weights, step, left = copied(model), 0, sorted(stops)
    try:
        for progress in training:
            if not left or progress.step < left[0]:
                continue
            left = [s for s in left if s > progress.step]
            found = score()
            if found < best or not math.isfinite(best):
                best, weights, step = found, copied(model), progress.step
    except ArithmeticError:  # a loss that is no number any more
        pass
    restore(model, weights)
    return Kept(start, best, step)


def find_rate(probe: Callable[[float], float], usual: float) -> float:
    """The peak rate, the usual one times a power of three, of least `probe(rate)`: the loss after a short course.

    From the usual rate downwards as long as that is better, else one step up.
    """
    losses = {0: probe(usual), -1: probe(usual / FACTOR)}
    way, limit = (1, HIGHEST) if losses[0] < losses[-1] else (-1, LOWEST)
    best = 0 if way == 1 else -1
    while best != limit:
        losses[best + way] = probe(usual * FACTOR ** (best + way))
        if losses[best + way] > losses[best]:
            break
        best += way
    return float(f"{usual * FACTOR**best:.4g}")


def copied(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers as they are now."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def restore(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put `copied` weights back, in place."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(weights[name])
