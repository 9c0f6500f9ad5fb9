"""Projection onto budgets: it holds, it leaves no room, it stays near the wish, and it is fast."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.allocation.budget import Projector, lattice, normalised, project, reachable
from autoprune.codec import Codec
from autoprune.costs.macs import Macs
from autoprune.costs.params import Params
from autoprune.errors import InputError
from autoprune.policy import IntArray, Policy
from autoprune.protocols import Budget, Cost, FloatArray
from autoprune.structure import Group, Op, Slice, Structure, TensorSpec
from tests.synthetic import chain, single_steps


@settings(max_examples=80, deadline=None)
@given(
    n_groups=st.integers(1, 16),
    seed=st.integers(0, 10_000),
    grid_step=st.sampled_from([1, 2, 4]),
    place=st.floats(0, 1),
    second=st.floats(0, 1),
    scored=st.booleans(),
)
def test_any_reachable_budget_is_met_to_the_cell(
    n_groups: int, seed: int, grid_step: int, place: float, second: float, scored: bool
) -> None:
    structure = chain(n_groups, seed, grid_step)
    rng = np.random.default_rng(seed)
    costs: dict[str, Cost] = {"macs": Macs(structure), "params": Params(structure)}
    limits = {}
    for name, share in (("macs", place), ("params", second)):
        low, high = reachable(structure, costs[name])
        limits[name] = low + share * (high - low)
    scores = {g.name: rng.random(g.width) for g in structure.groups} if scored else None
    policy = project(structure, costs, rng.random(n_groups), limits, scores)
    policy.check(structure)

    def holds(candidate: Policy) -> bool:
        widths = candidate.array(structure)
        return all(costs[name](widths) <= limit + 1e-12 for name, limit in limits.items())

    assert holds(policy)
    assert not any(holds(wider) for wider in single_steps(structure, policy))
    assert project(structure, costs, Codec(structure).encode(policy), limits, scores) == policy


def test_equal_wishes_stay_nearly_equal() -> None:
    structure = chain(12)
    policy = project(structure, {"macs": Macs(structure)}, np.ones(12), {"macs": 0.5})
    ratios = Codec(structure).encode(policy)
    cells = 1 / Codec(structure).dense
    assert np.all(np.abs(ratios - np.median(ratios)) <= 2 * cells + 0.02)


@pytest.mark.parametrize("flat", ["layer3", "layer8"])
def test_cells_go_back_to_the_group_whose_next_atoms_score_highest(flat: str) -> None:
    structure = chain(12)
    costs = {"macs": Macs(structure)}
    scores = {g.name: np.exp(-np.arange(g.width, dtype=np.float64)) for g in structure.groups}
    scores[flat] = np.ones(structure.group(flat).width)  # its last atom is as good as its first
    projector = Projector(structure, costs, scores)
    half = projector.codec.floor(np.full(12, 0.5))
    limits = {"macs": 1.2 * float(costs["macs"](projector.codec.widths(half)))}
    widened = projector.codec.policy(projector.give_back(half, limits)).as_dict()
    assert widened[flat] == structure.group(flat).width


def test_a_budget_below_the_grids_names_the_reachable_range() -> None:
    structure = chain(12, grid_step=8)
    low, high = reachable(structure, Macs(structure))
    assert high == 1.0
    with pytest.raises(InputError) as caught:
        project(structure, {"macs": Macs(structure)}, np.ones(12), {"macs": low / 2})
    named = float(str(caught.value).split("between ")[1].split(" and")[0])
    assert low <= named <= low + 2e-4
    assert project(structure, {"macs": Macs(structure)}, np.ones(12), {"macs": named}).as_dict()


def test_an_unknown_cost_is_answered_with_the_nearest() -> None:
    structure = chain(3)
    with pytest.raises(InputError, match="did you mean 'macs'"):
        project(structure, {"macs": Macs(structure)}, np.ones(3), {"mac": 0.5})
    with pytest.raises(InputError, match="at least one cost"):
        project(structure, {"macs": Macs(structure)}, np.ones(3), {})
    with pytest.raises(InputError, match="one ratio for each of 3 groups"):
        project(structure, {"macs": Macs(structure)}, np.ones(4), {"macs": 0.5})


class Bumpy:
    """Like a latency: widths that are not multiples of 4 cost double."""

    monotone = False
    dense = 1.0

    def __init__(self, structure: Structure) -> None:
        self._dense = Policy.dense(structure).array(structure)

    def __call__(self, widths: IntArray) -> FloatArray:
        return np.asarray((widths / self._dense * np.where(widths % 4, 2.0, 1.0)).mean(axis=-1))


def test_a_cost_that_is_not_monotone_filters() -> None:
    structure = chain(12)
    costs: dict[str, Cost] = {"macs": Macs(structure), "latency": Bumpy(structure)}
    policy = project(structure, costs, np.ones(12), {"macs": 0.6, "latency": 0.9})
    assert costs["macs"](policy.array(structure)) <= 0.6
    assert costs["latency"](policy.array(structure)) <= 0.9
    with pytest.raises(InputError, match="no widths within"):
        project(structure, costs, np.ones(12), {"macs": 0.6, "latency": 0.001})


def test_scores_must_fit_their_group_and_be_finite() -> None:
    structure = chain(3)
    good = {g.name: np.full(g.width, 2.0) for g in structure.groups}
    assert all(np.all(v == 1.0) for v in normalised(structure, good).values())
    for bad in (np.ones(2), np.full(structure.groups[0].width, np.nan)):
        with pytest.raises(InputError, match="finite scores"):
            normalised(structure, {**good, structure.groups[0].name: bad})


def test_two_hundred_groups_project_in_twenty_milliseconds() -> None:
    structure = chain(200)
    projector = Projector(structure, {"macs": Macs(structure), "params": Params(structure)})
    rng, seconds = np.random.default_rng(0), []
    for _ in range(9):
        start = time.process_time()
        projector.project(rng.random(200), {"macs": 0.5, "params": 0.6})
        seconds.append(time.process_time() - start)
    assert np.median(seconds) < 0.020


def test_the_asked_budgets_together_are_drawn_two_thirds_as_often_as_the_lattice() -> None:
    assert lattice(Budget("macs", 0.3, 0.9, (0.5, 0.95), {}), 9).tolist() == [*np.linspace(0.3, 0.9, 9), *[0.5] * 6]
    assert lattice(Budget("macs", 0.3, 0.9, (0.7, 0.5, 0.3), {}), 9).tolist()[9:] == [0.7, 0.5, 0.3] * 2
    assert len(lattice(Budget("macs", 0.3, 0.9, (), {}), 9)) == 9


def test_a_cell_goes_back_where_it_gains_most_for_its_price() -> None:
    """Two groups alike but for the size of their maps: the cheap one gets its atoms first, whatever comes before."""
    structure = two_layers(cheap_positions=4, dear_positions=40)
    costs: dict[str, Cost] = {"macs": Macs(structure)}
    scores = {"dear": np.full(8, 1.0), "cheap": np.full(8, 1.0)}
    projector = Projector(structure, costs, scores)
    start = projector.codec.floor(np.full(2, 0.5))
    room = {"macs": float(costs["macs"](projector.codec.widths(start))) + 40 / (8 * 44)}  # one atom of the dear one
    assert projector.codec.policy(projector.give_back(start, room)).as_dict() == {"dear": 4, "cheap": 8}


def test_the_best_of_the_atoms_that_are_gone_comes_back_first() -> None:
    structure = two_layers(cheap_positions=9, dear_positions=9)
    costs: dict[str, Cost] = {"macs": Macs(structure)}
    steep, even = np.array([8.0, 4.0, 2.0, 1.0, 0.4, 0.3, 0.2, 0.1]), np.full(8, 2.0)
    projector = Projector(structure, costs, {"dear": steep, "cheap": even})
    start = projector.codec.floor(np.array([0.5, 0.5]))  # what is gone of the steep one scores least
    room = {"macs": 1.3 * float(costs["macs"](projector.codec.widths(start)))}
    widths = projector.codec.policy(projector.give_back(start, room)).as_dict()
    assert widths["cheap"] > widths["dear"]
    steep = np.array([8.0, 8.0, 8.0, 8.0, 0.1, 0.1, 0.1, 0.1])
    projector = Projector(structure, costs, {"dear": steep, "cheap": even})
    start = projector.codec.floor(np.array([0.25, 0.25]))  # here the best that is gone of it scores most
    room = {"macs": 1.5 * float(costs["macs"](projector.codec.widths(start)))}
    assert projector.codec.policy(projector.give_back(start, room)).as_dict() == {"dear": 4, "cheap": 2}


def two_layers(cheap_positions: int, dear_positions: int) -> Structure:
    """Two convolutions with inputs of their own, of 8 atoms each."""
    groups, ops = [], []
    for name, positions in (("dear", dear_positions), ("cheap", cheap_positions)):
        spec = TensorSpec(f"{name}.weight", (8, 3, 1, 1), 4)
        ops.append(Op(name, "Conv2d", 0, positions, spec.name, tensors=(spec,)))
        groups.append(Group(name, "channel", 8, (Slice(spec.name, 0, "produce"),), tuple(range(1, 9))))
    return Structure(tuple(groups), tuple(ops))
