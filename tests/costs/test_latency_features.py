"""The quantities that latency is a sum of."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.costs._latency_features import Features, Present
from autoprune.costs._latency_table import OpTimes
from autoprune.policy import Policy
from tests.synthetic import chain, with_blocks


def test_an_operation_counts_as_often_as_it_is_called() -> None:
    structure = chain(2)
    (first, second), dense = structure.groups, Policy.dense(structure).array(structure)
    rows = {g.name: (g.grid[0], g.width) for g in (first, second)}

    def times(weight: str, calls: int, group: str, columns: tuple[int, ...], ms: float) -> OpTimes:
        line = (ms,) * len(columns)
        return OpTimes(((weight, calls),), rows[group], columns, (tuple(0.1 * m for m in line), line))

    ops = [times("layer0.weight", 3, "layer0", (3,), 2.0), times("layer1.weight", 1, "layer1", (first.width,), 5.0)]
    narrow = dense.copy()
    narrow[0] = first.grid[0]
    assert float(Features(structure, ops, ("ops",))(narrow)["ops"]) == pytest.approx((3 * 0.2 + 5.0) / (3 * 2.0 + 5.0))
    assert np.all(Features(structure, ops, ("ops",))(dense)["ops"] == 1.0)


def test_what_an_absent_block_holds_takes_no_time_and_writes_nothing() -> None:
    structure = with_blocks(chain(4))
    present = Present(structure, ["layer0.weight", "layer1.weight", "layer3.weight"])
    widths = np.array([[1, 1, 9, 9, 9, 9], [0, 1, 9, 9, 9, 9], [0, 0, 9, 9, 9, 9]])
    assert present(widths, np.ones((3, 3))).tolist() == [[1, 1, 1], [1, 0, 1], [1, 0, 0]]
    features = Features(structure, (), ("elements",))
    dense = np.array([g.width for g in structure])
    less = dense.copy()
    less[0] = 0
    ops = {op.name: op for op in structure.ops}
    gone = sum(ops[f"layer{i}"].positions * structure.group(f"layer{i}").width for i in (1, 2))
    gone += ops["layer2.shortcut"].positions * structure.group("layer2").width
    written = sum(op.positions * op.tensors[0].shape[0] for op in structure.ops if op.weight)
    assert float(features(less)["elements"]) == pytest.approx(1 - gone / written)
