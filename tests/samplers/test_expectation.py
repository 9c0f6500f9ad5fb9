"""What evolution has learnt: how few samples mislead, and that it is taken off what they said."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.codec import Codec
from autoprune.samplers._expectation import LEAST_LEARNT, Expectation, Round
from tests.synthetic import chain

STRUCTURE = chain(4)
CODEC = Codec(STRUCTURE)


def biased(bias: float) -> Round:
    state = Round(reach=1.0)
    for cost in np.linspace(0.3, 0.9, 8):
        state.learn(float(cost), bias)
    return state


def test_the_error_of_few_samples_is_their_loss_less_that_of_all() -> None:
    bias, doubt = biased(0.7).expected(np.array([0.3, 0.6]))
    assert bias == pytest.approx([0.7, 0.7])
    assert np.all(doubt < 0.1)
    assert Round(1.0).expected(np.array([0.5]))[0].tolist() == [0.0]


def test_a_loss_on_few_samples_is_believed_less_the_error_that_they_make() -> None:
    expectation = Expectation(CODEC, None, True, [biased(0.7)])
    rng = np.random.default_rng(0)
    positions = rng.integers(0, CODEC.last, size=(LEAST_LEARNT + 4, len(STRUCTURE)))
    truth = -CODEC.ratios(CODEC.widths(positions)).sum(axis=1)
    front = np.array([0.3, 0.9]), np.array([0.0, -4.0])
    assert expectation.predict(positions, front) is None
    for i, (row, value) in enumerate(zip(positions, truth, strict=True)):
        on_few = i % 2 == 0
        race_round = 0 if on_few else 1
        expectation.learn(CODEC.policy(row), 0.5, float(value) + 0.7 * on_few, race_round)
    predicted = expectation.predict(positions, front)
    assert predicted is not None
    assert np.abs(predicted[0] - truth).max() < 0.25
