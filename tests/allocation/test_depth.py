"""Widths at a fixed depth: a knapsack over what is left, within limits that count the whole network."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.allocation.depth import Depth
from autoprune.allocation.knapsack import penalties, predicted_loss
from autoprune.codec import Codec
from autoprune.space import Space, restrict
from autoprune.structure import Structure
from tests.synthetic import chain, make_problem, with_blocks

STRUCTURE = with_blocks(chain(6))
PROBLEM = make_problem(STRUCTURE)
PENALTIES = penalties(PROBLEM)
MACS = PROBLEM.costs["macs"]


def depth(*absent: str) -> Depth:
    return Depth(STRUCTURE, PROBLEM.costs, PENALTIES, frozenset(absent))


@pytest.mark.parametrize("absent", [(), ("block1",), ("block1", "block3")])
def test_widths_are_found_at_the_depth_that_was_given(absent: tuple[str, ...]) -> None:
    held = depth(*absent)
    assert held.cost("macs") == pytest.approx(float(MACS(held.policy.array(STRUCTURE))))
    for share in (0.8, 0.6):
        target = share * held.cost("macs")
        found = held.solved({"macs": target})
        assert found is not None
        policy, lost = found
        policy.check(STRUCTURE)
        widths = policy.as_dict()
        assert {name for name in ("block1", "block3") if not widths[name]} == set(absent)
        assert float(MACS(policy.array(STRUCTURE))) <= target
        positions = Codec(STRUCTURE).positions(policy.array(STRUCTURE))
        gone = sum(PENALTIES[STRUCTURE.names.index(name)][0] for name in absent)
        assert lost + gone == pytest.approx(float(predicted_loss(PENALTIES, positions)))


def test_a_budget_with_room_leaves_all_that_is_there_dense() -> None:
    found = depth("block3").solved({"macs": 1.0})
    assert found is not None
    assert found[0] == depth("block3").policy


def test_a_budget_out_of_reach_has_no_widths() -> None:
    assert depth().solved({"macs": 1e-6}) is None


def test_blocks_alone_are_there_or_not() -> None:
    alone: Structure = restrict(STRUCTURE, Space(granularity=("block",)))
    problem = make_problem(alone)
    held = Depth(alone, problem.costs, penalties(problem), frozenset({"block1"}))
    cost = held.cost("macs")
    assert held.solved({"macs": cost}) == (held.policy, 0.0)
    assert held.solved({"macs": cost - 1e-3}) is None
    assert np.array_equal(held.policy.array(alone), [0, 1])
