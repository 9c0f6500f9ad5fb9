"""A fine-tune never returns less than it was given: the best weights are kept, the peak rate is found (ALGORITHMS 8a).

Both are judged on samples that were not trained on. The evaluator takes the held-back quarter of the calibration split:
no repair has seen it, no sampler is told of it, and what is reported comes from validation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.protocols import Progress

CHECKS = 4
"""How often a course is scored, evenly spaced, beside its start."""
PROBE_STEPS, LONG_SHARE, LONGEST = 15, 4, 80
"""A whole short schedule: fewer steps tell a rate that is too high from a good one no better than chance. Where none of
them is better than the start, they tell nothing either: the least rate harms least. Then a probe is one part in so many
of the course, of so many steps at most."""
ENOUGH = 0.98
"""Of the loss of the start: what a probe must get below to tell something."""
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


def checks(steps: int, times: int = CHECKS) -> tuple[int, ...]:
    """The steps after which a course is scored, `times` in all where it has as many; the last is its end."""
    return tuple(sorted({max(1, round(steps * k / times)) for k in range(1, times + 1)})) if steps else ()


def scorings(steps: int) -> int:
    """How often held-back samples go through the model for a course: at its start and at each check."""
    return len(checks(steps)) + 1 if steps else 0


class Best:
    """The weights of least `score` that `model` had, those of its start included; it is scored at once.

    `history` holds every (step, score) so far, `weights` the best ones.
    """

    def __init__(self, model: nn.Module, score: Callable[[], float], stops: Iterable[int]) -> None:
        self._model, self._score, self._left = model, score, sorted(stops)
        self.history: list[tuple[int, float]] = [(0, score())]
        self.weights = copied(model)
        self._best = self.history[0]

    @staticmethod
    def of(
        model: nn.Module,
        score: Callable[[], float],
        stops: Iterable[int],
        history: Sequence[tuple[int, float]],
        weights: Mapping[str, Tensor],
    ) -> Best:
        """One that goes on where another stood; nothing is scored."""
        known = iter(history)
        made = Best(model, lambda: next(known)[1], stops)
        for step, loss in known:
            made._take(step, loss)
        made._score, made.weights = score, dict(weights)
        return made

    @property
    def kept(self) -> Kept:
        """What is best so far."""
        return Kept(self.history[0][1], self._best[1], self._best[0])

    @property
    def idle(self) -> int:
        """Scorings since the best one."""
        return sum(step > self._best[0] for step, _ in self.history)

    def look(self, step: int) -> bool:
        """Score the model if that is due after `step` steps; whether it was."""
        if not self._left or step < self._left[0]:
            return False
        if self._take(step, self._score()):
            self.weights = copied(self._model)
        return True

    def finish(self) -> Kept:
        """Leave the model with the best weights."""
        restore(self._model, self.weights)
        return self.kept

    def _take(self, step: int, loss: float) -> bool:
        """A score was found; whether it is the best."""
        self._left = [s for s in self._left if s > step]
        self.history.append((step, loss))
        if loss < self._best[1] or not math.isfinite(self._best[1]):
            self._best = step, loss
            return True
        return False


def keep_best(model: nn.Module, training: Iterable[Progress], score: Callable[[], float], stops: Iterable[int]) -> Kept:
    """Train `model` in place; it is left with the weights of least `score`, those of its start included.

    It is scored when a step of `stops` is done. A training whose loss is no longer finite ends there.
    """
    best = Best(model, score, stops)
    try:
        for progress in training:
            best.look(progress.step)
    except ArithmeticError:  # a loss that is no number any more
        pass
    return best.finish()


def probe_lengths(steps: int) -> tuple[int, ...]:
    """How many steps the probes for a course of `steps` have: few, and more where those tell nothing."""
    short, longer = min(PROBE_STEPS, steps), min(LONGEST, steps // LONG_SHARE)
    return (short, longer) if longer > short else (short,)


def find_rate(probe: Callable[[float, int], float], usual: float, start: float, lengths: Sequence[int]) -> float:
    """The peak rate, the usual one times a power of three, of least `probe(rate, steps)`: the loss after so many steps.

    Of the first of the `lengths` at which a probe is clearly better than the loss of the `start`, else of the last.
    """

    def at(length: int) -> Callable[[int], float]:
        return lambda power: probe(usual * FACTOR**power, length)

    for length in lengths:
        enough = -math.inf if length == lengths[-1] else ENOUGH * start
        power, loss = _least(at(length), enough)
        if loss < enough:
            break
    return float(f"{usual * FACTOR**power:.4g}")


def _least(probe: Callable[[int], float], enough: float) -> tuple[int, float]:
    """The power of least `probe`, and what that is: from 0 downwards as long as that is better, else one step up.

    Downwards only if the first two get below `enough`, where that is a number.
    """
    losses = {0: probe(0), -1: probe(-1)}
    way, limit = (1, HIGHEST) if losses[0] < losses[-1] else (-1, LOWEST)
    best = 0 if way == 1 else -1
    if way == -1 and math.isfinite(enough) and losses[best] >= enough:
        return best, losses[best]
    while best != limit:
        losses[best + way] = probe(best + way)
        if losses[best + way] > losses[best]:
            break
        best += way
    return best, losses[best]


def copied(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers as they are now."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def restore(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put `copied` weights back, in place."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(weights[name])
