"""The surrogate: it goes through what it knows, says where it does not, and ranks what it has not seen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from autoprune.samplers._surrogate import Surrogate


def hills(ratios: np.ndarray) -> np.ndarray:
    """Losses with groups of unequal weight and one pair that acts together."""
    return np.log(
        0.02 + np.sum((1 - ratios) ** 2 * np.arange(1, 7), axis=1) + 4 * (1 - ratios[:, 0]) * (1 - ratios[:, 5])
    )


def fitted(n: int, seed: int = 0, noise: float = 0.0) -> tuple[Surrogate, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ratios = rng.random((n, 6))
    values = hills(ratios) + rng.normal(0.0, 1.0, n) * noise
    return Surrogate(ratios, values, np.full(n, noise)), ratios, values


def test_what_was_measured_is_predicted_with_little_doubt() -> None:
    surrogate, ratios, values = fitted(60)
    mean, deviation = surrogate.predict(ratios)
    assert np.abs(mean - values).max() < 0.15 * values.std()
    assert deviation.max() < 0.2 * values.std()


def test_unseen_policies_are_ranked_and_the_doubt_covers_the_error() -> None:
    surrogate, _, _ = fitted(150)
    unseen = np.random.default_rng(1).random((200, 6))
    mean, deviation = surrogate.predict(unseen)
    assert spearmanr(mean, hills(unseen))[0] > 0.9
    assert np.mean(np.abs(mean - hills(unseen)) < 2 * deviation) > 0.9


def test_doubt_grows_with_the_distance_from_what_was_measured() -> None:
    ratios = np.full((5, 4), 0.9) + np.eye(5, 4) * 0.05
    surrogate = Surrogate(ratios, np.arange(5.0), np.zeros(5))
    _, deviation = surrogate.predict(np.linspace(0.9, 0.1, 5)[:, None].repeat(4, axis=1))
    assert np.all(np.diff(deviation) > 0)


def test_noisy_values_weigh_less() -> None:
    ratios = np.array([[0.5, 0.5], [0.5, 0.5], [0.9, 0.9]])
    values, noises = np.array([0.0, 3.0, 1.0]), np.array([0.01, 10.0, 0.01])
    mean, _ = Surrogate(ratios, values, noises).predict(ratios[:1])
    assert abs(mean[0]) < 0.2


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100))
def test_the_unit_of_the_values_changes_nothing_but_the_unit(scale: float, shift: float) -> None:
    rng = np.random.default_rng(2)
    ratios, values, unseen = rng.random((12, 3)), rng.normal(size=12), rng.random((4, 3))
    mean, deviation = Surrogate(ratios, values, np.zeros(12)).predict(unseen)
    scaled, deviation_scaled = Surrogate(ratios, scale * values + shift, np.zeros(12)).predict(unseen)
    assert scaled == pytest.approx(scale * mean + shift, rel=1e-6, abs=1e-6 * scale + 1e-9)
    assert deviation_scaled == pytest.approx(scale * deviation, rel=1e-6)


def test_equal_values_are_predicted_everywhere() -> None:
    mean, _ = Surrogate(np.random.default_rng(3).random((9, 3)), np.full(9, 2.0), np.zeros(9)).predict(np.ones((1, 3)))
    assert mean[0] == pytest.approx(2.0)
