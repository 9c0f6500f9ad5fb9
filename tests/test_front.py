"""A front: what stands on it, which point is chosen of it, and what goes first where it is thinned."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.front import Front
from autoprune.pareto import front_volume, pareto_front, thinned
from autoprune.policy import Policy
from tests.fronts import synthetic_front
from tests.synthetic import chain

ASK = Ask(Policy.dense(chain(2)), "refit")
SHARES = st.floats(0.01, 0.99)


def told(loss: float, *costs: float) -> Evaluation:
    return Evaluation(ASK, loss, dict(zip(("macs", "params"), costs, strict=False)))


def volume(front: list[Evaluation], logarithmic: bool = True) -> float:
    return front_volume(((tuple(e.costs.values()), e.loss) for e in front), logarithmic)


@settings(deadline=None)
@given(st.lists(st.tuples(SHARES, SHARES, SHARES), min_size=3, max_size=12), st.booleans(), st.booleans())
def test_the_first_to_go_is_the_one_that_the_hypervolume_misses_least(
    values: list[tuple[float, float, float]], two_costs: bool, logarithmic: bool
) -> None:
    costs = ("macs", "params") if two_costs else ("macs",)
    front = list(pareto_front([told(loss, *rest[: len(costs)]) for loss, *rest in values], costs))
    left = thinned(front, len(front) - 1, costs, logarithmic)
    without = [volume(front[:i] + front[i + 1 :], logarithmic) for i in range(len(front))]
    assert len(left) == len(front) - 1
    assert volume(left, logarithmic) == pytest.approx(max(without), abs=1e-9)
    assert left == [e for e in front if e in left], "ascending as before"


def test_a_front_keeps_more_volume_than_one_thinned_evenly() -> None:
    front = [told(math.exp(-8 * m), m) for m in np.linspace(0.1, 0.9, 200) ** 2]
    evenly = [front[round(i)] for i in np.linspace(0, 199, 20)]
    left = thinned(front, 20, ("macs",))
    assert len(left) == 20
    assert volume(left) > volume(evenly) + 0.005


def test_those_that_are_spared_stay_and_a_short_front_is_left_alone() -> None:
    front = [told(1 - m, m) for m in np.linspace(0.1, 0.9, 50)]
    assert thinned(front, 50, ("macs",)) == front
    assert thinned([], 3, ("macs",)) == []
    left = thinned(front, 5, ("macs",), spared={7, 8, 9})
    assert len(left) == 5
    assert [e for e in front[7:10] if e in left] == front[7:10]
    assert thinned(front, 2, ("macs",), spared={7, 8, 9}) == front[7:10]


def test_losses_and_costs_beyond_the_reference_are_thinned_over_their_whole_range() -> None:
    front = [told(100.0 - m, m) for m in np.linspace(0.5, 3.0, 60)]
    kept = [e.costs["macs"] for e in thinned(front, 10, ("macs",), logarithmic=False)]
    assert min(np.diff(kept)) > 0.1
    assert min(kept) < 1.0
    assert max(kept) > 2.5
    stuck = [told(1 - m, m, 1.5) for m in np.linspace(0.1, 0.9, 60)]
    kept = [e.costs["macs"] for e in thinned(stuck, 10, ("macs", "params"))]
    assert min(kept) < 0.2
    assert max(kept) > 0.8


def test_of_equals_one_stays_and_who_is_no_better_in_anything_goes() -> None:
    best, equal = told(0.2, 0.5), told(0.2, 0.5)
    front = pareto_front([told(0.2, 0.6), best, equal, told(0.1, 0.9), told(0.3, 0.5)], ("macs",))
    assert [(e.costs["macs"], e.loss) for e in front] == [(0.5, 0.2), (0.9, 0.1)]
    assert front[0] is best


@pytest.mark.parametrize("n_costs", [1, 2, 3])
def test_a_front_is_what_a_pairwise_search_for_dominators_leaves(n_costs: int) -> None:
    rng, costs = np.random.default_rng(n_costs), tuple("abc"[:n_costs])
    for n in (1, 2, 40):
        values = rng.integers(0, 5, size=(n, n_costs + 1)) / 4
        told = [
            Evaluation(Ask(Policy.of({"g": i + 1}), "refit"), float(row[-1]), dict(zip(costs, row, strict=False)))
            for i, row in enumerate(values)
        ]
        beaten = [
            any((v <= row).all() and ((v < row).any() or j < i) for j, v in enumerate(values) if j != i)
            for i, row in enumerate(values)
        ]
        expected = [e for e, out in zip(told, beaten, strict=True) if not out]
        front = pareto_front(told, costs)
        assert set(e.ask for e in front) == {e.ask for e in expected}
        assert [e.costs["a"] for e in front] == sorted(e.costs["a"] for e in front)


def test_within_a_limit_the_least_loss_wins() -> None:
    front = synthetic_front()
    within = [p for p in front if p.ratio("macs") <= 0.5]
    assert len(within) > 1
    assert front.select(macs=0.5) == min(within, key=lambda p: p.loss())


def scored(values: list[float], direction: str) -> Front:
    """The synthetic front with these values of a metric "score" on validation, of which the dense model has .5."""
    front = synthetic_front()
    base = replace(front.base, metrics={"validation": {"score": 0.5}}, directions={"score": direction})
    points = [replace(p, metrics={"validation": {"score": v}}, base=base) for p, v in zip(front, values, strict=True)]
    return Front(tuple(points), base, {}, {})


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_a_drop_is_how_much_worse_the_metric_is_and_the_cheapest_within_it_wins(direction: str) -> None:
    worse = -1.0 if direction == "maximize" else 1.0
    drops = [0.3, 0.2, -0.1, 0.05, 0.01, 0.0]
    front = scored([0.5 + worse * drop for drop in drops], direction)
    for asked, index in ((0.3, 0), (0.25, 1), (0.06, 2), (0.0, 2)):
        assert front.select(f"drop={asked}").id == front[index].id


def test_a_drop_in_per_cent_is_refused_where_the_metric_is_a_share() -> None:
    front = scored([0.2, 0.3, 0.6, 0.45, 0.49, 0.5], "maximize")
    with pytest.raises(InputError, match=r"score is a share, of which at most 1 can be lost; did you mean drop=0\.05"):
        front.select(drop=5)
    assert scored([0.2, 0.3, 6.0, 0.45, 0.49, 0.5], "minimize").select(drop=5).id == front[0].id


def test_the_knee_is_the_point_farthest_below_the_chord_of_the_logarithm_of_the_loss() -> None:
    front = synthetic_front()
    costs = [p.ratio("macs") for p in front]
    shares = [(c - costs[0]) / (costs[-1] - costs[0]) for c in costs]
    losses = [1000.0 ** (1 - s) for s in shares]  # a straight line on the logarithm's scale
    losses[3] /= 3.0
    points = [
        replace(p, losses={"validation": {"name": "kl", "loss": loss}}) for p, loss in zip(front, losses, strict=True)
    ]
    assert replace(front, points=tuple(points)).select("knee").id == front[3].id
