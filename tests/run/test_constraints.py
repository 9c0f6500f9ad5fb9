"""Constraints on task metrics: how they are read, and what a sampler is told."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest

from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.policy import Policy
from autoprune.run.constraints import Constrained, kept, parse_constraints, penalised

ASK = Ask(Policy.of({"a": 1}), "refit")


def test_floors_and_ceilings_are_read_and_checked() -> None:
    floor, ceiling = parse_constraints({"accuracy": ">=0.9", "error": "<= 1e-1"}, ["accuracy", "error"])
    assert (floor.metric, floor.sign, floor.bound) == ("accuracy", 1, 0.9)
    assert (ceiling.sign, ceiling.bound) == (-1, 0.1)
    assert kept([floor, ceiling], {"accuracy": 0.9, "error": 0.05})
    assert not kept([floor], {"accuracy": 0.89})
    assert not kept([ceiling], {"error": 0.11})
    assert kept([floor], {})


@pytest.mark.parametrize("text", ["0.9", ">0.9", ">= ", ">=nine", ">=1e999", "==0.5"])
def test_a_bound_that_is_none_is_one_clear_line(text: str) -> None:
    with pytest.raises(InputError, match=r"constraints\.accuracy must look like '>=0\.97' or '<=0\.1', not"):
        parse_constraints({"accuracy": text}, ["accuracy"])


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no metric 'acuracy'; did you mean 'accuracy'"):
        parse_constraints({"acuracy": ">=0.5"}, ["accuracy"])


def test_a_miss_makes_the_loss_grow_with_it_and_partial_answers_stay() -> None:
    bound = parse_constraints({"accuracy": ">=0.8"}, ["accuracy"])
    near, far = (penalised(bound, Evaluation(ASK, 0.1, {}, {"accuracy": a})) for a in (0.79, 0.6))
    assert 0.1 < near.loss < far.loss
    assert near.loss == pytest.approx(0.1 * math.exp(20 * 0.01 / 0.8))
    assert penalised(bound, Evaluation(ASK, 0.1)).loss == 0.1
    assert penalised(bound, Evaluation(ASK, -0.5, {}, {"accuracy": 0.4})).loss == pytest.approx(9.5)
    failed = Evaluation.failed(ASK, "broken")
    assert penalised(bound, failed) == failed


def test_a_sampler_is_told_the_penalised_loss() -> None:
    class Listener:
        told: ClassVar[list[float]] = []

        def ask(self) -> Ask:
            return ASK

        def tell(self, evaluation: Evaluation) -> None:
            self.told.append(evaluation.loss)

    sampler = Constrained(Listener(), parse_constraints({"accuracy": ">=1"}, ["accuracy"]))
    assert sampler.ask() is ASK
    sampler.tell(Evaluation(ASK, 1.0, {}, {"accuracy": 0.9}))
    assert Listener.told == [pytest.approx(math.exp(2))]
