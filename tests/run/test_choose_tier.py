"""The cascade calibrates itself: candidates, the choice of a tier, and a dead proxy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from autoprune.evaluation import Ask, Evaluation
from autoprune.policy import Policy
from autoprune.run.choose_tier import candidates, choose_tier, proxy_asks
from autoprune.strategies.knapsack import knapsack
from autoprune.strategies.uniform import uniform
from tests.synthetic import chain, make_problem, true_loss

STRUCTURE = chain(9)
PROBLEM = make_problem(STRUCTURE)


def answers(chosen: list[tuple[float, Policy]], noise: dict[str, float], seed: int = 0) -> list[Evaluation]:
    """The tune tier tells the truth, the others with this much noise in the log loss."""
    rng = np.random.default_rng(seed)

    def answer(ask: Ask) -> Evaluation:
        blur = math.exp(rng.normal(0, noise[ask.tier])) if noise[ask.tier] else 1.0
        return Evaluation(ask, true_loss(STRUCTURE, ask.policy) * blur, seconds=0.1, passes=1.0)

    return [answer(ask) for _, ask in proxy_asks(chosen)]


@pytest.mark.parametrize("problem", [PROBLEM, replace(PROBLEM, table=None)])
def test_a_dozen_distinct_candidates_are_spread_over_the_budgets(problem: type(PROBLEM)) -> None:
    chosen = candidates(problem, np.random.default_rng(0))
    assert len({p for _, p in chosen}) == 12
    assert {t for t, _ in chosen} == set(problem.budget.at)
    assert all(problem.costs["macs"](p.array(STRUCTURE)) <= t for t, p in chosen)
    again = candidates(problem, np.random.default_rng(0))
    assert again == chosen


@pytest.mark.parametrize("at", [(0.5,), (0.7, 0.3), (0.7, 0.5, 0.3)])
def test_at_every_budget_some_are_around_the_knapsack_and_some_around_uniform(
    at: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoprune.run.choose_tier.SPREAD", 0.0)
    problem = replace(PROBLEM, budget=replace(PROBLEM.budget, at=at))
    assert sorted(candidates(problem, np.random.default_rng(0)), key=str) == sorted(
        ((t, arm(problem, t)) for t in at for arm in (knapsack, uniform)), key=str
    )


def test_the_cheapest_adequate_tier_is_chosen() -> None:
    chosen = candidates(PROBLEM, np.random.default_rng(0))
    both = choose_tier(chosen, answers(chosen, {"stitch": 0.01, "refit": 0.0, "tune": 0.0}))
    assert (both.tier, both.dead) == ("stitch", False)
    blurred = choose_tier(chosen, answers(chosen, {"stitch": 5.0, "refit": 0.01, "tune": 0.0}))
    assert (blurred.tier, blurred.dead) == ("refit", False)
    assert "fitness is refit; rank correlation with tune over 12 candidates" in blurred.verdict
    assert "an evaluation takes: stitch 0.1 s and 1 passes, refit 0.1 s" in blurred.verdict
    fair = choose_tier(chosen, answers(chosen, {"stitch": 5.0, "refit": 2.0, "tune": 0.0}, seed=6))
    assert 0.3 < fair.qualities[1].correlation < 0.7
    assert "fitness is refit, although no cheap tier reaches a rank correlation of 0.7;" in fair.verdict


def test_a_dead_proxy_is_said_aloud_with_what_to_change() -> None:
    chosen = candidates(PROBLEM, np.random.default_rng(0))
    truth = answers(chosen, {"stitch": 0.0, "refit": 0.0, "tune": 0.0})
    n = len(chosen)
    upside_down = [replace(e, loss=1 / e.loss) if i < 2 * n else e for i, e in enumerate(truth)]
    dead = choose_tier(chosen, upside_down)
    assert dead.dead
    assert dead.tier == "refit"
    assert "evaluator.calibration samples" in dead.verdict
    assert "evaluator.fitness: tune" in dead.verdict


def test_a_budget_alone_is_no_quality() -> None:
    """A tier that sees nothing but the budget ranks all candidates well, and none within their budget."""
    chosen = candidates(PROBLEM, np.random.default_rng(0))
    truth = answers(chosen, {"stitch": 0.0, "refit": 0.0, "tune": 0.0})
    n = len(chosen)
    blind = [replace(e, loss=1 - chosen[i % n][0]) if i < 2 * n else e for i, e in enumerate(truth)]
    assert choose_tier(chosen, blind).dead


def test_candidates_that_fail_are_left_out() -> None:
    chosen = candidates(PROBLEM, np.random.default_rng(0))
    some = answers(chosen, {"stitch": 0.01, "refit": 0.01, "tune": 0.0})
    some[3] = Evaluation.failed(some[3].ask, "not finite")
    found = choose_tier(chosen, some)
    assert "over 11 candidates" in found.verdict
    assert all(math.isfinite(q.correlation) for q in found.qualities)


def test_a_tier_at_which_all_fail_ranks_nothing() -> None:
    chosen = candidates(PROBLEM, np.random.default_rng(0))
    some = answers(chosen, {"stitch": 0.01, "refit": 0.01, "tune": 0.0})
    lost = [Evaluation.failed(e.ask, "the loss is nan") if e.ask.tier == "tune" else e for e in some]
    found = choose_tier(chosen, lost)
    assert found.dead
    assert "over 0 candidates" in found.verdict
