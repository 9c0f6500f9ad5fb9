"""Which tier deserves the budget: the cascade measures itself before the search (ALGORITHMS 5).

A dozen candidates, stratified over the budgets, go through `stitch`, `refit` and `tune`; the cheapest tier that ranks
them as the brief fine-tune does becomes the fitness, and a dead proxy is said aloud.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from autoprune.allocation.budget import Projector
from autoprune.allocation.knapsack import Allocator, penalties
from autoprune.estimates import spearman
from autoprune.evaluation import Ask, Evaluation, Labelled
from autoprune.policy import IntArray, Policy
from autoprune.protocols import FloatArray, Problem

CHEAP: tuple[Literal["stitch"], Literal["refit"]] = ("stitch", "refit")
JUDGE: Literal["tune"] = "tune"
N_CANDIDATES = 12
SPREAD = 0.35
"""Half the width of the uniform noise on ratios that makes candidates differ."""
ENOUGH = 0.7
"""Rank correlation with the fine-tuned loss, budgets apart, from which a cheap tier is adequate."""
CLOSE = 0.1
"""A cheaper tier this close to the best one is as good: twelve candidates tell no finer."""
DEAD = 0.3
"""Below this, a proxy is no better than chance."""


@dataclass(frozen=True)
class TierQuality:
    """How a tier ranks the candidates against `tune`: rank correlation in all and in the better half, and its price."""

    tier: str
    correlation: float
    better_half: float
    seconds: float
    passes: float


@dataclass(frozen=True)
class TierChoice:
    """The chosen fitness tier, what it was chosen from, and one sentence about it; `dead` where no proxy ranks."""

    tier: Literal["stitch", "refit"]
    qualities: tuple[TierQuality, ...]
    dead: bool
    verdict: str

    def facts(self) -> dict[str, Any]:
        """Plain values for the run folder."""
        return {**asdict(self), "candidates": N_CANDIDATES, "enough": ENOUGH, "dead_below": DEAD}


def candidates(problem: Problem, rng: np.random.Generator) -> list[tuple[float, Policy]]:
    """A dozen distinct (target, policy), spread around the knapsack's solution and around uniform, by turns.

    Without a table around uniform alone.
    """
    projector = Projector(problem.structure, problem.costs)
    budget, codec = problem.budget, projector.codec
    targets = budget.at or tuple(float(t) for t in np.linspace(budget.low, budget.high, 5)[1:4])
    all_limits = [{**budget.limits, budget.cost: target} for target in targets]
    centres = [[codec.ratios(codec.widths(c)) for c in _centres(problem, projector, limits)] for limits in all_limits]
    found: dict[Policy, float] = {}
    for k in range(4 * N_CANDIDATES):  # a tiny space may hold fewer
        if len(found) == N_CANDIDATES:
            break
        turn, i = divmod(k, len(targets))
        centre = centres[i][turn % len(centres[i])]
        noise = 0.0 if turn == 0 else rng.uniform(-SPREAD, SPREAD, size=len(centre))
        found.setdefault(projector.project(centre + noise, all_limits[i]), targets[i])
    return [(target, policy) for policy, target in found.items()]


def proxy_asks(chosen: Sequence[tuple[float, Policy]]) -> Labelled:
    """Every candidate at every tier, labelled "stitch@0.5"."""
    return [(f"{tier}@{t:g}", Ask(policy, tier)) for tier in (*CHEAP, JUDGE) for t, policy in chosen]


def choose_tier(chosen: Sequence[tuple[float, Policy]], answers: Sequence[Evaluation]) -> TierChoice:
    """Choose the cheapest adequate tier; `answers` answer `proxy_asks(chosen)` in order."""
    n, strata = len(chosen), np.array([t for t, _ in chosen])
    by_tier = {tier: answers[i * n : (i + 1) * n] for i, tier in enumerate((*CHEAP, JUDGE))}
    alive = np.array([all(e.ok for e in row) for row in zip(*by_tier.values(), strict=True)], dtype=bool)
    values = {tier: _within_strata(es, strata, alive) for tier, es in by_tier.items()}
    judged = values[JUDGE]
    best = np.argsort(judged, kind="stable")[: (len(judged) + 1) // 2]
    qualities = tuple(
        TierQuality(
            tier,
            spearman(values[tier], judged),
            spearman(values[tier][best], judged[best]),
            float(np.median([e.seconds for e in es])),
            float(np.median([e.passes for e in es])),
        )
        for tier, es in by_tier.items()
    )
    return _choose({q.tier: q for q in qualities}, qualities, int(alive.sum()))


def _choose(by_tier: Mapping[str, TierQuality], qualities: tuple[TierQuality, ...], n: int) -> TierChoice:
    top = max(by_tier[tier].correlation for tier in CHEAP)
    adequate = [t for t in CHEAP if by_tier[t].correlation >= max(ENOUGH, top - CLOSE)]
    tier = adequate[0] if adequate else max(reversed(CHEAP), key=lambda t: by_tier[t].correlation)
    ranks = (f"{q.tier} {q.correlation:.2f} ({q.better_half:.2f} in the better half)" for q in qualities[:-1])
    prices = (f"{q.tier} {q.seconds:.2g} s and {q.passes:.3g} passes" for q in qualities)
    what = (
        f"rank correlation with {qualities[-1].tier} over {n} candidates: {', '.join(ranks)}; "
        f"an evaluation takes: {', '.join(prices)}"
    )
    if top < DEAD:
        verdict = (
            f"no cheap tier ranks candidates as the fine-tune does ({what}); the search will be hardly better "
            f"than chance: more evaluator.calibration samples, more evaluator.finetune_steps or "
            f"evaluator.fitness: tune may help"
        )
        return TierChoice("refit", qualities, True, verdict)
    doubt = "" if adequate else f", although no cheap tier reaches a rank correlation of {ENOUGH:g}"
    return TierChoice(tier, qualities, False, f"fitness is {tier}{doubt}; {what}")


def _within_strata(evaluations: Sequence[Evaluation], strata: FloatArray, alive: FloatArray) -> FloatArray:
    """Losses as ranks of their distance to their budget's mean log loss: budgets themselves rank too easily."""
    losses = np.array([e.loss for e in evaluations])[alive]
    values = np.log(losses) if len(losses) and losses.min() > 0 else losses
    kept = strata[alive]
    for stratum in np.unique(kept):
        here = kept == stratum
        values[here] = values[here] - values[here].mean()
    return np.asarray(values, dtype=np.float64)


def _centres(problem: Problem, projector: Projector, limits: Mapping[str, float]) -> list[IntArray]:
    """Positions to spread around: the knapsack's, where there is a table, and the uniform ones."""
    uniform = projector.positions(np.ones(len(problem.structure)), limits)
    if problem.table is None:
        return [uniform]
    return [Allocator(problem.structure, problem.costs).solve(penalties(problem), limits), uniform]
