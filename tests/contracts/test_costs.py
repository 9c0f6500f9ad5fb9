"""The contract of every file in autoprune/costs."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune import plugins
from autoprune.costs import build_cost
from autoprune.policy import Policy
from autoprune.protocols import Cost
from tests.synthetic import attending
from tests.tables import latency_table

STRUCTURE = attending()
WIDTHS = np.array(
    [
        [g.grid[i] for g, i in zip(STRUCTURE.groups, row, strict=True)]
        for row in (
            np.random.default_rng(3).integers(0, [len(g.grid) for g in STRUCTURE.groups], size=(20, len(STRUCTURE)))
        )
    ]
)


@pytest.fixture(params=plugins.names("costs"))
def cost(request: pytest.FixtureRequest) -> Cost:
    return build_cost(request.param, STRUCTURE, latency_table(STRUCTURE))


def test_the_dense_model_costs_exactly_one(cost: Cost) -> None:
    dense = Policy.dense(STRUCTURE).array(STRUCTURE)
    assert cost(dense) == 1.0
    assert cost(np.stack([dense, dense])).tolist() == [1.0, 1.0]
    assert cost.dense > 0


def test_many_widths_at_once_cost_what_they_cost_one_by_one(cost: Cost) -> None:
    together = cost(WIDTHS)
    assert together.shape == (len(WIDTHS),)
    assert together.tolist() == [float(cost(w)) for w in WIDTHS]
    assert cost(WIDTHS.reshape(4, 5, -1)).shape == (4, 5)


def test_a_cost_declared_monotone_never_falls_when_a_group_gets_wider(cost: Cost) -> None:
    if not cost.monotone:
        pytest.skip("not declared monotone")
    for widths in WIDTHS:
        for i, group in enumerate(STRUCTURE.groups):
            line = np.repeat(widths[None], len(group.grid), axis=0)
            line[:, i] = group.grid
            assert np.all(np.diff(cost(line)) >= 0)


def test_costs_are_positive_and_a_pruned_model_costs_less(cost: Cost) -> None:
    assert np.all(cost(WIDTHS) > 0)
    assert cost(np.array([g.grid[0] for g in STRUCTURE.groups])) < 1
