"""What is left of a run is told from what was measured, and all of its work is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autoprune.evaluation import Ask, Evaluation
from autoprune.protocols import Step
from autoprune.run.ledger import Prices
from autoprune.run.pace import Pace
from autoprune.run.plan import PLAIN_PASS, Plan
from autoprune.strategies.uniform import uniform
from tests.synthetic import chain, make_problem

PRICES = Prices(statistics=100, fitness=200, heldback=100, validation=100, lesson=1000)
PROBLEM = make_problem(chain(4), seeded=False)
ASKS = [(f"a{t}", Ask(uniform(PROBLEM, t), "refit")) for t in (0.3, 0.4, 0.5, 0.6, 0.7)]


def answered(ask: Ask, seconds: float) -> Evaluation:
    return Evaluation(ask, 1.0, {"macs": 0.5}, seconds=seconds)


def test_the_time_left_follows_what_an_answer_took() -> None:
    plan = Plan(PRICES, pace_s=0.01)
    plan.guess({"search": {"refit": 3000.0}, "fine-tuned": {"tune": 3000.0}})
    assert plan.left_s(2) == pytest.approx(6000 * PLAIN_PASS * 0.01 / 2)
    plan.expect("seeds", ASKS)
    plan.told("seeds", answered(ASKS[0][1], seconds=3.0))  # 300 samples
    assert plan.left_s(1) == pytest.approx((4 * 300 + 6000) * 0.01)
    plan.told("search", answered(replace(ASKS[1][1], tier="tune"), seconds=66.0))  # 3 300 samples
    assert plan.left_s(1, ["fine-tuned"]) == pytest.approx(3000 * 66 / 3300)
    assert plan.left_s(1, ["seeds"]) == pytest.approx(4 * 300 * 0.01)
    assert Plan(PRICES).left_s(1) == 0.0


def test_work_counts_once_and_all_of_it() -> None:
    plan = Plan(PRICES)
    plan.guess({"search": {"refit": 1500.0}, "held back": {"refit": 600.0}})
    plan.expect("seeds", [*ASKS, ASKS[0]])
    assert plan.total("refit") == pytest.approx(5 + 5 + 2)
    for _, ask in [*ASKS, ASKS[0]]:
        plan.told("seeds", answered(ask, 1.0))
    assert plan.counted("seeds", "refit") == "6 of 6 evaluations"
    assert plan.counted("search", "refit") == "0 of 5 full evaluations"
    assert plan.said("refit") == "about 12 full evaluations' worth of work: search 5, held back 2, seeds 5"
    plan.settle("search")
    plan.settle("held back")
    assert plan.done("refit") == plan.total("refit") == pytest.approx(5)
    assert plan.left_s(1) is not None


def test_a_step_tells_how_far_it_is_and_what_comes_after_it() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert pace.left_s is None
    pace.take(Step("statistics", 0, 8, "batches", ahead_s=100.0))
    now[0] = 10.0
    pace.take(Step("statistics", 2, 8, "batches", ahead_s=100.0))
    assert (pace.counted, pace.left_s) == ("2 of 8 batches", 130.0)
    pace.take(Step("drop pass", 0.25, 1.0))
    assert pace.counted == "25%"
