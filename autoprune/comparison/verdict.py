"""Did layer-wise search beat the control? The rule is fixed here, before any result is seen, and said either way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from autoprune.comparison.arm import Arm, Scored
from autoprune.estimates import LEVEL, RESAMPLES, FloatArray, paired

CONTROLS = ("global", "uniform")
"""The first of these that is compared is the one to beat; neither is layer-wise."""
RULE = (
    f"Paired percentile bootstrap of the mean loss difference over seeds and validation samples, {RESAMPLES} "
    f"resamples, {100 * LEVEL:g} % interval, generator seed 0 (over seeds alone where the losses of single samples are "
    f"unknown). Layer-wise beat the control only where the whole interval is below 0, and is worse where it is above "
    f"0; anything else is no difference shown. Every comparison stands by itself: the level is not corrected for their "
    f"number."
)
Outcome = Literal["beat", "worse", "no difference shown", "no point"]


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


def control_of(strategies: Sequence[str]) -> str | None:
    """The strategy that the others have to beat; None where neither global nor uniform is compared."""
    return next((name for name in CONTROLS if name in strategies), None)


def judge(
    arms: Mapping[tuple[str, int], Arm], strategies: Sequence[str], budgets: Sequence[float], seeds: Sequence[int]
) -> tuple[Verdict, ...]:
    """A verdict for every budget and every strategy that is no control; none where there is no control."""
    control = control_of(strategies)
    if control is None:
        return ()
    made = []
    for i, budget in enumerate(budgets):
        theirs = [arms[control, seed].chosen[i] for seed in seeds]
        for name in strategies:
            if name not in CONTROLS:
                ours = [arms[name, seed].chosen[i] for seed in seeds]
                made.append(verdict((budget, name, control), ours, theirs))
    return tuple(made)


def verdict(case: tuple[float, str, str], ours: Sequence[Scored | None], theirs: Sequence[Scored | None]) -> Verdict:
    """The verdict on (budget, strategy, control) from the points of each seed, in the same order of seeds."""
    budget, name, control = case
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if len(pairs) < len(ours):
        who = name if any(a is None for a in ours) else control
        text = f"layer-wise did NOT beat {control} at {budget:g}: {who} has no point within the budget at every seed"
        return Verdict(*case, "no point", None, None, None, len(pairs), 0, text)
    table = _differences(pairs)
    mean, low, high = paired(table, np.random.default_rng(0))
    outcome: Outcome = "beat" if high < 0 else "worse" if low > 0 else "no difference shown"
    n_seeds, n_samples = table.shape
    losses = [float(np.mean([p.loss for p in side])) for side in zip(*pairs, strict=True)]
    seen = f"{n_seeds} seed{'s' * (n_seeds > 1)}" + (f" x {n_samples} samples" if n_samples > 1 else " alone")
    words = {"beat": "has the lower loss", "worse": "is worse", "no difference shown": "shows no difference"}[outcome]
    text = (
        f"layer-wise {'beat' if outcome == 'beat' else 'did NOT beat'} {control} at {budget:g}: {name} {words}, "
        f"{losses[0]:.4g} against {losses[1]:.4g}, difference {mean:+.3g}, {100 * LEVEL:g} % interval [{low:+.3g}, "
        f"{high:+.3g}] ({seen})"
    )
    return Verdict(*case, outcome, mean, low, high, n_seeds, n_samples, text)


def _differences(pairs: Sequence[tuple[Scored, Scored]]) -> FloatArray:
    """[seeds, samples] of sample losses where both sides have the same samples, else [seeds, 1] of mean losses."""
    lengths = {len(p.sample_losses) for pair in pairs for p in pair}
    if len(lengths) == 1 and lengths != {0}:
        return np.array([np.subtract(a.sample_losses, b.sample_losses) for a, b in pairs])
    return np.array([[a.loss - b.loss] for a, b in pairs])
