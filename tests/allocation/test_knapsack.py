"""Allocation over a sensitivity table: penalties, the knapsack against brute force, and the front of one sweep."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autoprune.allocation.budget import reachable
from autoprune.allocation.knapsack import Allocator, penalties, predicted_loss
from autoprune.codec import Codec
from autoprune.costs.macs import Macs
from autoprune.costs.params import Params
from autoprune.errors import InputError
from autoprune.policy import IntArray, Policy
from autoprune.protocols import Cost, FloatArray, Problem
from autoprune.structure import Group, Structure
from tests.synthetic import chain, make_problem, single_steps

STRUCTURE = chain()


@dataclass(frozen=True)
class Sum:
    """A cost that adds up over the groups."""

    weights: FloatArray
    monotone: bool = True
    dense: float = 1.0

    def __call__(self, widths: IntArray) -> FloatArray:
        return np.asarray(widths @ self.weights, dtype=np.float64)


@dataclass(frozen=True)
class Tiles:
    """A cost in whole tiles of eight atoms of each of two neighbours: monotone, coupled, no polynomial."""

    n_tiles: npt.NDArray[np.int64]
    monotone: bool = True
    dense: float = 1.0

    def __call__(self, widths: IntArray) -> FloatArray:
        tiles = -(-widths // 8)
        whole = np.sum(self.n_tiles[1:] * self.n_tiles[:-1])
        return np.asarray(np.sum(tiles[..., 1:] * tiles[..., :-1], axis=-1) / whole, dtype=np.float64)


@dataclass(frozen=True)
class Ragged:
    """A cost that odd widths make dearer, so that it is not monotone."""

    full: IntArray
    monotone: bool = False
    dense: float = 1.0

    def __call__(self, widths: IntArray) -> FloatArray:
        return np.asarray(np.mean(widths / self.full + 0.1 * (widths % 2), axis=-1), dtype=np.float64)


def coarse(structure: Structure, rng: np.random.Generator, most: int) -> Structure:
    """The structure with 2 to `most` random widths on each grid."""
    groups = []
    for g in structure.groups:
        below = rng.choice(np.arange(1, g.width), size=int(rng.integers(1, most)), replace=False)
        groups.append(Group(g.name, g.kind, g.width, g.slices, (*sorted(int(w) for w in below), g.width)))
    return Structure(tuple(groups), structure.ops, {})


def random_penalties(structure: Structure, rng: np.random.Generator, smooth: bool) -> list[FloatArray]:
    result: list[FloatArray] = []
    for g in structure.groups:
        if smooth:
            result.append(10 ** rng.uniform(-2, 0) * (1 - np.array(g.grid) / g.width) ** 2)
        else:
            steps = np.sort(rng.gamma(0.5, size=len(g.grid)))[::-1]
            result.append(steps - steps[-1])
    return result


def least(
    structure: Structure, costs: Mapping[str, Cost], prices: Sequence[FloatArray], limits: Mapping[str, float]
) -> float:
    """The least predicted loss within the limits, by looking at all policies."""
    everything = np.array(list(itertools.product(*[range(len(g.grid)) for g in structure.groups])))
    widths = Codec(structure).widths(everything)
    within = np.all([costs[name](widths) <= limit + 1e-12 for name, limit in limits.items()], axis=0)
    return float(predicted_loss(prices, everything[within]).min())


def between(structure: Structure, costs: Mapping[str, Cost], share: float) -> dict[str, float]:
    """Limits on all costs at a share of the way from the narrowest to dense."""
    ranges = {name: reachable(structure, cost) for name, cost in costs.items()}
    return {name: low + share * (high - low) for name, (low, high) in ranges.items()}


def with_table(table: Mapping[str, Mapping[int, float]], seeded: bool = False) -> Problem:
    return replace(make_problem(STRUCTURE, seeded=seeded), table=table)


def test_penalties_are_the_measured_losses_above_the_dense_ones_never_rise_and_end_at_zero() -> None:
    problem = make_problem(STRUCTURE)
    assert problem.table is not None
    for group, curve in zip(STRUCTURE.groups, penalties(problem), strict=True):
        row = problem.table[group.name]
        assert len(curve) == len(group.grid)
        assert curve[-1] == 0.0
        assert np.all(np.diff(curve) <= 0)
        for width in row:
            wider = [max(row[w] - row[group.width], 0.0) for w in row if w >= width]
            assert curve[group.grid.index(width)] == pytest.approx(max(wider), rel=1e-12, abs=1e-15)


def test_between_and_below_the_measured_widths_the_square_root_of_the_loss_is_a_line() -> None:
    table = {g.name: {g.width // 2: 0.04} for g in STRUCTURE.groups}
    for group, curve in zip(STRUCTURE.groups, penalties(with_table(table)), strict=True):
        narrowed = 1 - np.array(group.grid) / group.width
        assert np.allclose(np.sqrt(curve), 0.2 * narrowed / 0.5)


@pytest.mark.parametrize("known_from", ["table", "seeds", "least"])
def test_losses_may_be_negated_accuracies(known_from: str) -> None:
    table: dict[str, dict[int, float]] = {g.name: {g.grid[0]: -0.5, g.width // 2: -0.8} for g in STRUCTURE.groups}
    dense = -0.8
    problem = with_table(table, seeded=True)
    if known_from != "least":
        dense = -0.9
    if known_from == "table":
        table["layer0"][STRUCTURE.groups[0].width] = dense
    if known_from == "seeds":
        seed = problem.seeds[0]
        measured = replace(seed, loss=dense, ask=replace(seed.ask, policy=Policy.dense(STRUCTURE)))
        problem = replace(problem, seeds=(*problem.seeds, measured))
    for curve in penalties(problem):
        assert curve[0] == pytest.approx(-0.5 - dense)


def test_a_failed_measurement_counts_as_far_worse_than_all_others() -> None:
    table = {g.name: {g.grid[0]: np.inf if i == 3 else 0.1, g.width: 0.0} for i, g in enumerate(STRUCTURE.groups)}
    assert [c[0] for c in penalties(with_table(table))] == pytest.approx([0.1] * 3 + [1.0] + [0.1] * 8)


def test_without_a_table_or_a_row_of_it_there_is_one_clear_line() -> None:
    problem = make_problem(STRUCTURE)
    with pytest.raises(
        InputError, match=r"strategy x needs the sensitivity table: set evaluator.sensitivity to 2 or m"
    ):
        penalties(replace(problem, table=None), "strategy x")
    with pytest.raises(InputError, match="lacks group 'layer3'"):
        penalties(replace(problem, table={n: {1: 0.1} for n in STRUCTURE.names if n != "layer3"}))


@settings(max_examples=60, deadline=None)
@example(n=5, seed=6, share=0.5, smooth=False)  # prices and exchanges alone end 2.3 times above it
@example(n=6, seed=6, share=0.5, smooth=True)
@given(n=st.integers(1, 6), seed=st.integers(0, 10_000), share=st.floats(0, 1), smooth=st.booleans())
def test_where_the_cost_adds_up_the_allocation_is_the_best_there_is(
    n: int, seed: int, share: float, smooth: bool
) -> None:
    rng = np.random.default_rng(seed)
    structure = coarse(chain(n, seed), rng, 6)
    shares = rng.gamma(1.0, size=n)
    costs: dict[str, Cost] = {"sum": Sum(shares / shares.sum() / Codec(structure).dense)}
    prices, limits = random_penalties(structure, rng, smooth), between(structure, costs, share)
    found = Allocator(structure, costs).solve(prices, limits)
    assert predicted_loss(prices, found) == pytest.approx(least(structure, costs, prices, limits), rel=1e-9, abs=1e-12)


def test_where_the_cost_couples_groups_the_allocation_is_nearly_always_the_best_there_is() -> None:
    gaps = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        structure = coarse(chain(3 + seed % 4, seed), rng, 5)
        costs: dict[str, Cost] = {"macs": Macs(structure), "params": Params(structure)}
        prices, both = random_penalties(structure, rng, smooth=seed % 2 == 0), between(structure, costs, seed / 50)
        worst = float(predicted_loss(prices, np.zeros(len(structure), dtype=np.int64)))
        for limits in ({"macs": both["macs"]}, both):
            found = predicted_loss(prices, Allocator(structure, costs).solve(prices, limits))
            gaps.append((float(found) - least(structure, costs, prices, limits)) / worst)
    assert min(gaps) >= -1e-12
    assert np.mean(np.array(gaps) < 1e-9) >= 0.9
    assert max(gaps) < 0.1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 14), share=st.floats(0, 1), smooth=st.booleans())
def test_all_limits_hold_and_no_group_can_take_one_more_cell(seed: int, n: int, share: float, smooth: bool) -> None:
    rng = np.random.default_rng(seed)
    structure = chain(n, seed)
    costs: dict[str, Cost] = {"macs": Macs(structure), "params": Params(structure)}
    prices, limits = random_penalties(structure, rng, smooth), between(structure, costs, share)
    policy = Codec(structure).policy(Allocator(structure, costs).solve(prices, limits))

    def holds(candidate: Policy) -> bool:
        return all(costs[c](candidate.array(structure)) <= limit + 1e-12 for c, limit in limits.items())

    assert holds(policy)
    assert not any(holds(wider) for wider in single_steps(structure, policy))


def test_a_cost_that_is_no_polynomial_is_met_and_allocated_well() -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        structure = coarse(chain(5, seed), rng, 5)
        costs: dict[str, Cost] = {"tiles": Tiles(-(-Codec(structure).dense // 8))}
        prices, limits = random_penalties(structure, rng, smooth=True), between(structure, costs, 0.5)
        found = Allocator(structure, costs).solve(prices, limits)
        worst = float(predicted_loss(prices, np.zeros(5, dtype=np.int64)))
        assert float(predicted_loss(prices, found)) - least(structure, costs, prices, limits) < 0.1 * worst


def test_a_cost_that_is_not_monotone_is_held_to_its_limit() -> None:
    dense = Codec(STRUCTURE).dense
    costs: dict[str, Cost] = {"macs": Macs(STRUCTURE), "latency": Ragged(dense)}
    prices = random_penalties(STRUCTURE, np.random.default_rng(0), smooth=True)
    allocator, codec = Allocator(STRUCTURE, costs), Codec(STRUCTURE)
    for limits in ({"macs": 0.6, "latency": 0.7}, {"latency": 0.5}):
        widths = codec.widths(allocator.solve(prices, limits))
        assert all(costs[name](widths) <= limit for name, limit in limits.items())
    with pytest.raises(InputError, match="no widths within"):
        allocator.solve(prices, {"macs": 0.6, "latency": 0.01})


def test_the_front_of_one_sweep_leads_from_narrow_to_dense_without_wide_gaps() -> None:
    problem = make_problem(STRUCTURE)
    prices, allocator = penalties(problem), Allocator(STRUCTURE, problem.costs)
    front = np.stack(allocator.front(prices, "macs", {}))
    costs, losses = problem.costs["macs"](Codec(STRUCTURE).widths(front)), predicted_loss(prices, front)
    assert np.all(np.diff(costs) > 0)
    assert np.all(np.diff(losses) < 0)
    assert costs[0] < 0.1
    assert losses[-1] == 0.0
    assert np.all(np.diff(costs)[costs[:-1] > 0.2] < 0.08)
    for cost, loss in zip(costs[5::10], losses[5::10], strict=True):  # no better one is found for one budget alone
        alone = predicted_loss(prices, allocator.solve(prices, {"macs": float(cost)}))
        assert abs(float(alone) - loss) <= 0.02 * losses[0]


def test_a_front_keeps_to_limits_on_other_costs() -> None:
    problem = make_problem(STRUCTURE)
    front = Allocator(STRUCTURE, problem.costs).front(penalties(problem), "macs", {"params": 0.4, "macs": 0.6})
    widths = Codec(STRUCTURE).widths(np.stack(front))
    assert len(front) > 5
    assert problem.costs["params"](widths).max() <= 0.4
    assert problem.costs["macs"](widths).max() <= 0.6


def test_flat_penalties_and_groups_with_one_width_are_no_trouble() -> None:
    single = [replace(g, grid=(g.width,)) if i % 2 else g for i, g in enumerate(STRUCTURE.groups)]
    structure = Structure(tuple(single), STRUCTURE.ops, {})
    costs: dict[str, Cost] = {"macs": Macs(structure)}
    flat = [np.zeros(len(g.grid)) for g in structure.groups]
    allocator = Allocator(structure, costs)
    assert costs["macs"](Codec(structure).widths(allocator.solve(flat, {"macs": 0.7}))) <= 0.7
    assert allocator.front(flat, "macs", {})
    with pytest.raises(InputError, match="one value for each position"):
        allocator.solve(flat[:-1], {"macs": 0.7})


def test_an_unreachable_limit_is_refused_with_the_range() -> None:
    prices = penalties(make_problem(STRUCTURE))
    with pytest.raises(InputError, match=r"macs=0\.001 is out of reach"):
        Allocator(STRUCTURE, {"macs": Macs(STRUCTURE)}).solve(prices, {"macs": 0.001})
