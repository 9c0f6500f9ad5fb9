"""The ledger of a search: what an ask costs, how much may still be spent, and when a plateau or the clock ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from autoprune.allocation.loss_scale import loss_scale
from autoprune.evaluation import Ask, Evaluation, Tier
from autoprune.pareto import hypervolume
from autoprune.protocols import Problem

REPEATS_PER_TRIAL = 4
"""Repeats at most for each full evaluation of the ledger: they cost nothing, and a sampler may end in nothing else."""
GAIN = 1e-3
"""The least relative growth of the hypervolume that is no plateau."""
LOG_LOSS_SPAN = 1.0
"""How far above the first losses (in log loss) the reference point of the plateau's hypervolume lies."""


@dataclass(frozen=True)
class Prices:
    """What an ask costs in samples that go through the network; a backward pass counts two.

    `statistics`, `fitness`, `heldback` and `validation` are the sizes of the parts, `lesson` the samples of all steps
    of a brief fine-tune, in which the held-back samples are scored `scorings` times. With `watched` full evaluations on
    fitness carry metrics (there are constraints), with `by_metric` a metric is the loss. A task's metrics read the
    outputs that the loss was computed from, but for two: validation's, and those of a `stitch` whose batches repaired
    themselves.
    """

    statistics: int
    fitness: int
    heldback: int
    validation: int
    lesson: int
    watched: bool = False
    by_metric: bool = False
    scorings: int = 0

    def samples(self, ask: Ask) -> float:
        """Samples that go forward for `ask`, those of backward passes twice more."""
        scored = {"fitness": self.fitness, "heldback": self.heldback, "validation": self.validation}[ask.split]
        scored = max(1, round(ask.fraction * scored))
        if ask.tier == "stitch" and ask.split == "fitness" and not self.by_metric:
            return scored + (scored + self.statistics if self.watched and ask.fraction == 1.0 else 0.0)
        if ask.split == "validation" and not self.by_metric:
            scored *= 2
        tuned = 3.0 * self.lesson + self.scorings * self.heldback if ask.tier == "tune" else 0.0
        return scored + self.statistics + tuned

    def full(self, ask: Ask, tier: Tier) -> float:
        """The price of `ask` in full evaluations at the fitness tier `tier`."""
        return self.samples(ask) / self.samples(Ask(ask.policy, tier))

    def worth(self, asks: Iterable[Ask], tier: Tier) -> float:
        """What `asks` cost together: one that comes again costs nothing."""
        return sum(self.full(ask, tier) for ask in dict.fromkeys(asks))


class Ledger:
    """Counts what a search has asked for, in full evaluations at the fitness tier; repeats cost nothing.

    `may_ask` says whether there is room for one more. With `patience` the search ends after so many full evaluations
    without a larger hypervolume of (costs, log loss); `out_of_time` is asked where the record has no answer yet.
    `stopped` says why the search ended before the ledger was spent.
    """

    def __init__(
        self,
        n_trials: float,
        price: Callable[[Ask], float],
        before: Iterable[Ask] = (),
        patience: float | None = None,
        plateau: Plateau | None = None,
        out_of_time: Callable[[], bool] = lambda: False,
    ) -> None:
        self.n_trials, self.spent, self.repeats = n_trials, 0.0, 0
        self._price, self._seen = price, set(before)
        self._answered = set(self._seen)
        self._patience, self._plateau = patience, plateau
        self._out_of_time = out_of_time
        self._told = self._improved = 0.0
        self.stopped = ""

    def may_ask(self, recorded: bool) -> bool:
        """Whether one more ask fits; one that the record already answers takes no time."""
        if self.stopped or self.spent >= self.n_trials - 1e-9:
            return False
        if self.repeats >= REPEATS_PER_TRIAL * self.n_trials:
            self.stopped = f"the sampler repeats itself ({self.repeats} of its asks were known)"
        elif self._patience is not None and self._told - self._improved >= self._patience:
            self.stopped = f"no larger hypervolume in {self._patience:g} full evaluations (search.patience)"
        elif not recorded and self._out_of_time():
            self.stopped = "the time limit is reached (search.time_limit_s)"
        return not self.stopped

    def charge(self, ask: Ask) -> None:
        """Count an ask as it is made, so that a resumed run counts alike."""
        if ask in self._seen:
            self.repeats += 1
        else:
            self._seen.add(ask)
            self.spent += self._price(ask)

    def told(self, evaluation: Evaluation) -> None:
        """Look for a plateau."""
        if evaluation.ask not in self._answered:
            self._answered.add(evaluation.ask)
            self._told += self._price(evaluation.ask)
        if self._plateau is not None and self._plateau.grows(evaluation):
            self._improved = self._told


class Plateau:
    """Watches the hypervolume of (costs, log loss) of the full evaluations at the fitness tier.

    `judged` turns an answer into what the sampler is told of it; the problem's seeds are that already.
    """

    def __init__(self, problem: Problem, judged: Callable[[Evaluation], Evaluation] = lambda e: e) -> None:
        self._costs, self._tier, self._judged = problem.objectives, problem.tier, judged
        self._scale = loss_scale(problem)
        self._points: list[list[float]] = []
        self._volume = 0.0
        values = [self._scale(e.loss) for e in problem.seeds if e.ok]
        self._reference = np.array([*(1.0 for _ in self._costs), max(values, default=0.0) + LOG_LOSS_SPAN])
        for seed in problem.seeds:
            self.grows(seed)

    def grows(self, evaluation: Evaluation) -> bool:
        """Take an evaluation in; whether the hypervolume grew by more than a tenth of a percent."""
        evaluation = self._judged(evaluation)
        if not evaluation.ok or evaluation.ask.fraction < 1.0 or evaluation.ask.tier != self._tier:
            return False
        point = [*(evaluation.costs[c] for c in self._costs), self._scale(evaluation.loss)]
        if any(all(a <= b for a, b in zip(p, point, strict=True)) for p in self._points):
            return False
        self._points = [p for p in self._points if not all(a <= b for a, b in zip(point, p, strict=True))] + [point]
        volume = hypervolume(np.array(self._points), self._reference)
        grown = volume > self._volume * (1 + GAIN)
        self._volume = volume if grown else self._volume
        return grown
