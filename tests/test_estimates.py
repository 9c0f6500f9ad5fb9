"""Bootstrap intervals: they cover what they should, need little memory, and depend on their generator alone."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from autoprune.errors import InputError
from autoprune.estimates import crossed, interval, spearman


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = generator(1)
    hits = sum(low <= 2.0 <= high for low, high in (interval(rng.normal(2.0, 3.0, 80), rng) for _ in range(300)))
    assert 0.90 <= hits / 300 <= 0.98


def test_the_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    values = generator(2).normal(0.0, 1.0, 4000)
    low, high = interval(values, generator())
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(len(values)), rel=0.08)


def test_a_higher_level_is_wider() -> None:
    values = generator(3).exponential(size=200)
    narrow, wide = interval(values, generator(), 0.5), interval(values, generator(), 0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_the_paired_interval_covers_other_seeds_as_well_as_other_samples() -> None:
    rng = generator(4)
    samples, seeds = rng.normal(0, 1, 500), rng.normal(0, 1, (3, 1))
    mean, low, high = crossed(0.2 + 0.01 * seeds + 0.1 * samples)
    assert low < mean < high
    wider = crossed(0.2 + 1.0 * seeds + 0.1 * samples)
    assert wider[2] - wider[1] > 5 * (high - low), "seeds that disagree widen it"
    assert crossed(0.2 + 0.1 * samples[None])[1] > 0, "one seed: samples alone"


def test_pairing_removes_what_both_arms_share() -> None:
    rng = generator(5)
    hard, noise = rng.exponential(1.0, 400), rng.normal(0, 0.01, (3, 400))
    _, low, high = crossed((hard + 0.05 + noise) - hard)
    assert 0.045 < low < high < 0.055


def test_a_constant_difference_has_no_width() -> None:
    assert crossed(np.full((3, 20), 0.25)) == (0.25, 0.25, 0.25)
    assert interval([0.25], generator()) == (0.25, 0.25)


def test_equal_generators_give_equal_intervals() -> None:
    values = generator(6).normal(size=(3, 50))
    assert interval(values[0], generator(7)) != interval(values[0], generator(8))
    assert interval(values[0], generator(7)) == interval(values[0], generator(7))


def test_ten_thousand_samples_need_little_memory() -> None:
    values = generator(9).normal(size=(3, 10_000))
    tracemalloc.start()
    interval(values[0], generator())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


@pytest.mark.parametrize("values", [[], [np.nan], [1.0, np.inf], [[1.0]]])
def test_what_has_no_interval_is_refused(values: list[float]) -> None:
    with pytest.raises(InputError, match="a bootstrap needs finite values"):
        interval(values, generator())


def test_a_level_outside_its_range_is_refused() -> None:
    with pytest.raises(InputError, match="between 0 and 1, not 95"):
        interval([1.0, 2.0], generator(), 95)


def test_rank_correlation_sees_order_only() -> None:
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(a, np.exp(3 * a)) == pytest.approx(1.0)
    assert spearman(a, -(a**5)) == pytest.approx(-1.0)
    assert spearman(a, np.ones(4)) == 0.0


@pytest.mark.parametrize("n_seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("share", [0.0, 1.0, 4.0, 100.0])
def test_two_equal_arms_are_told_apart_in_at_most_six_of_a_hundred(n_seeds: int, share: float) -> None:
    rng, wrong, n, runs = generator(1), 0, 40, 400
    for _ in range(runs):
        seeds = share * np.sqrt(n_seeds / n) * rng.normal(size=(n_seeds, 1))
        _, low, high = crossed(seeds + rng.normal(size=(1, n)) + rng.normal(size=(n_seeds, n)))
        wrong += low > 0 or high < 0
    assert wrong / runs <= 0.06 + 2 * np.sqrt(0.05 * 0.95 / runs)
