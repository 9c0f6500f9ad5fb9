"""A loss that cannot tell candidates apart is found out on the first policies, and no other one is accused."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.evaluation import Ask, Evaluation
from autoprune.policy import Policy
from autoprune.run.telling import cannot_tell


def seen(losses: list[float], low: float = 0.3, high: float = 0.9) -> list[Evaluation]:
    costs = np.linspace(high, low, len(losses))
    return [
        Evaluation(Ask(Policy.of({"a": i + 1}), "refit"), loss, {"macs": float(cost)})
        for i, (loss, cost) in enumerate(zip(losses, costs, strict=True))
    ]


RISING = [0.01 * 1.4**i for i in range(16)]


@pytest.mark.parametrize("value", [0.0, 1e-12, 0.7])
def test_a_loss_of_one_value_is_found_out(value: float) -> None:
    said = cannot_tell(seen([value] * 5), "macs", "kl")
    assert said is not None
    assert "the loss kl cannot tell candidates apart" in said
    assert "from 0.90 down to 0.30" in said


def test_a_loss_that_falls_with_pruning_is_found_out() -> None:
    said = cannot_tell(seen(RISING[::-1]), "macs", "mse")
    assert said is not None
    assert "does not rise with pruning" in said


def test_a_loss_that_rises_even_if_not_everywhere_is_fine() -> None:
    bumpy = [loss * (3 if i % 2 else 1) for i, loss in enumerate(RISING)]
    assert cannot_tell(seen(RISING), "macs", "kl") is None
    assert cannot_tell(seen(bumpy), "macs", "kl") is None
    assert cannot_tell(seen([0.0] * 12 + [0.01, 0.02, 0.03]), "macs", "kl") is None


def test_too_few_policies_or_too_narrow_a_budget_say_nothing() -> None:
    assert cannot_tell(seen([0.0] * 3), "macs", "kl") is None
    assert cannot_tell(seen(RISING[:8][::-1]), "macs", "kl") is None
    assert cannot_tell(seen(RISING[::-1], low=0.85), "macs", "kl") is None


def test_failures_and_partial_evaluations_and_the_dense_model_do_not_count() -> None:
    dense = Evaluation(Ask(Policy.of({"a": 99}), "refit"), 0.0, {"macs": 1.0})
    failed = [Evaluation.failed(e.ask, "no", e.costs) for e in seen([1.0] * 16)]
    partial = [Evaluation(Ask(e.ask.policy, "refit", 0.5), 0.0, e.costs) for e in seen([0.0] * 16)]
    assert cannot_tell([dense, *failed, *partial, *seen([0.0] * 3)], "macs", "kl") is None
