"""A cost along one group's grid is what the cost itself says there, by formula or evaluated."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.allocation.cost_lines import CostLines, padded_grids
from autoprune.codec import Codec
from autoprune.costs.macs import Macs
from autoprune.protocols import Cost
from autoprune.structure import Structure
from tests.allocation.test_knapsack import Sum, Tiles
from tests.synthetic import chain

STRUCTURE = chain(6)


def costs_of(structure: Structure) -> dict[str, Cost]:
    codec = Codec(structure)
    even = np.full(len(structure), 1 / len(structure))
    return {"macs": Macs(structure), "tiles": Tiles(-(-codec.dense // 8)), "sum": Sum(even / codec.dense)}


@pytest.mark.parametrize(("name", "quadratic", "additive"), [("macs", True, False), ("tiles", False, False),
                                                             ("sum", True, True)])  # fmt: skip
def test_moves_of_one_group_and_of_two_cost_what_the_cost_says(name: str, quadratic: bool, additive: bool) -> None:
    cost, codec = costs_of(STRUCTURE)[name], Codec(STRUCTURE)
    lines = CostLines(codec, padded_grids(STRUCTURE), cost)
    assert (lines.quadratic, lines.additive) == (quadratic, additive)
    rng = np.random.default_rng(0)
    positions, cells = (rng.integers(0, codec.last + 1) for _ in range(2))
    groups = np.arange(len(STRUCTURE))

    def moved(*which: int) -> float:
        there = positions.copy()
        there[list(which)] = cells[list(which)]
        return float(cost(codec.widths(there)))

    change = lines.change(positions, groups)
    for group in groups:
        for cell in range(int(codec.last[group]) + 1):
            there = positions.copy()
            there[group] = cell
            found = float(cost(codec.widths(positions))) + change[group, cell]
            assert found == pytest.approx(float(cost(codec.widths(there))), abs=1e-12)
    pairs = lines.pairs(positions, groups, cells)
    for a in groups:
        for b in groups:
            assert pairs[a, b] == pytest.approx(moved(a, b), abs=1e-12)
