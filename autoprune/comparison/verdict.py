"""Did layer-wise search beat the control? The rule is fixed here, before any result is seen, and said either way."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from autoprune.comparison.arm import Arm, Scored
from autoprune.estimates import LEVEL, FloatArray, crossed
from autoprune.run.summary import beat_words

MIN_SEEDS = 2
"""Below it an interval says nothing of other seeds; from here on it keeps its level (benchmarks/verdict.py)."""
RULE = (
    f"The {100 * LEVEL:g} % interval of the mean loss difference, paired by seed and validation sample: seeds and "
    f"samples are crossed random factors, each with the t quantile of its own degrees of freedom, half-widths added in "
    f"quadrature (over seeds alone where the losses of single samples are unknown, over samples alone for two "
    f"strategies that are the same at every seed). Layer-wise beat the control only where the whole interval is below "
    f"0, and is worse where it is above 0; anything else is no difference shown, and with fewer than {MIN_SEEDS} seeds "
    f"there are too few to tell. Every comparison stands by itself: the level is not corrected for their number."
)
Outcome = Literal["beat", "worse", "no difference shown", "no point", "too few seeds"]
WORDS = {"beat": "has the lower loss", "worse": "is worse", "no difference shown": "shows no difference"}


@dataclass(frozen=True)
class Verdict:
    """One searcher against the control at one budget; `difference` is its mean loss minus the control's."""

    budget: float
    strategy: str
    control: str
    outcome: Outcome
    difference: float | None
    low: float | None
    high: float | None
    seeds: int
    samples: int
    text: str


def judge(
    arms: Mapping[tuple[str, int], Arm],
    budgets: Sequence[float],
    controls: Sequence[str],
    unchanging: Collection[str],
) -> tuple[Verdict, ...]:
    """A verdict for every budget and every strategy that is no control, against the last control; none without one.

    `unchanging` are the strategies that are the same at every seed.
    """
    if not controls:
        return ()
    names, seeds = list(dict.fromkeys(n for n, _ in arms)), list(dict.fromkeys(seed for _, seed in arms))
    control, made = controls[-1], []
    for i, budget in enumerate(budgets):
        theirs = [arms[control, seed].chosen[i] for seed in seeds]
        for name in (name for name in names if name not in controls):
            ours = [arms[name, seed].chosen[i] for seed in seeds]
            case = Case(budget, name, control, unchanging={name, control} <= set(unchanging))
            made.append(verdict(case, ours, theirs))
    return tuple(made)


@dataclass(frozen=True)
class Case:
    """Who is judged against whom at which budget; with `unchanging` both are the same at every seed."""

    budget: float
    strategy: str
    control: str
    unchanging: bool = False

    def found(self, outcome: Outcome, said: str, table: FloatArray | None = None) -> Verdict:
        """The verdict in one sentence, with the interval of the differences `table` where there is one."""
        mean, low, high = (None, None, None) if table is None else crossed(table)
        n_seeds, n_samples = (0, 0) if table is None else table.shape
        text = f"{beat_words('layer-wise', self.control, beat=outcome == 'beat')} at {self.budget:g}: {said}"
        return Verdict(self.budget, self.strategy, self.control, outcome, mean, low, high, n_seeds, n_samples, text)


def verdict(case: Case, ours: Sequence[Scored | None], theirs: Sequence[Scored | None]) -> Verdict:
    """The verdict from the points of each seed, in the same order of seeds."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    name = case.strategy
    if len(pairs) < len(ours):
        who = name if any(a is None for a in ours) else case.control
        return case.found("no point", f"{who} has no point within the budget at every seed")
    losses = [float(np.mean([p.loss for p in side])) for side in zip(*pairs, strict=True)]
    seen = f"{losses[0]:.4g} against {losses[1]:.4g}"
    if len(pairs) < MIN_SEEDS and not case.unchanging:
        few = f"too few seeds to tell, {len(pairs)} where it takes {MIN_SEEDS} or more"
        return case.found("too few seeds", f"{few}; {name} has {seen}")
    table = _differences(pairs[:1] if case.unchanging else pairs)
    mean, low, high = crossed(table)
    outcome: Outcome = "beat" if high < 0 else "worse" if low > 0 else "no difference shown"
    n_seeds, n_samples = table.shape
    size = f"{n_seeds} seed{'s' * (n_seeds > 1)}" + (f" x {n_samples} samples" if n_samples > 1 else " alone")
    within = f"{100 * LEVEL:g} % interval [{low:+.3g}, {high:+.3g}] ({size})"
    return case.found(outcome, f"{name} {WORDS[outcome]}, {seen}, difference {mean:+.3g}, {within}", table)


def _differences(pairs: Sequence[tuple[Scored, Scored]]) -> FloatArray:
    """[seeds, samples] of sample losses where both sides have the same samples, else [seeds, 1] of mean losses."""
    lengths = {len(p.sample_losses) for pair in pairs for p in pair}
    if len(lengths) == 1 and lengths != {0}:
        return np.array([np.subtract(a.sample_losses, b.sample_losses) for a, b in pairs])
    return np.array([[a.loss - b.loss] for a, b in pairs])
