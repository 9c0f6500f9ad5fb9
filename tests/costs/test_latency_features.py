"""The quantities that latency is a sum of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autoprune.costs._latency_features import Features, Present
from autoprune.costs._latency_table import OpTimes
from autoprune.costs.latency import Latency
from autoprune.policy import Policy
from autoprune.structure import Structure
from tests.synthetic import chain, with_blocks
from tests.tables import latency_table


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


def test_the_parts_add_up_to_the_prediction_and_say_what_no_width_touches() -> None:
    structure = chain(3)
    dense, table = Policy.dense(structure).array(structure), latency_table(structure)
    table = replace(table, coefficients={"ops": 0.6, "elements": 0.1, "macs": 0.1})
    cost, narrow = Latency(structure, table), np.array([g.grid[0] for g in structure])
    for widths in (dense, narrow):
        assert sum(cost.parts(widths).values()) == pytest.approx(float(cost(widths)))
    before, after = cost.parts(dense), cost.parts(narrow)
    assert before["fixed"] == pytest.approx(0.2)
    assert (before["fixed"], before["untouched"]) == (after["fixed"], after["untouched"])
    assert after["narrowed"] < before["narrowed"]
    assert after["written"] < before["written"] == pytest.approx(0.1)
    lone = Structure(structure.groups[1:], structure.ops, {"layer0": "frozen"}, structure.fingerprint)
    first = next(op for op in table.ops if op.uses[0][0] == "layer0.weight")
    total = sum(op.ms[-1][-1] for op in table.ops)
    macs = {op.name: op.positions * np.prod(op.tensors[0].shape) for op in structure.ops if op.weight is not None}
    macs["attention"] = structure.ops[-1].positions
    still = (macs["layer0"] + macs["attention"]) / sum(macs.values())
    expected = 0.6 * first.ms[-1][-1] / total + 0.1 * still
    assert Latency(lone, table).parts(dense[1:])["untouched"] == pytest.approx(expected)


def test_an_operation_in_a_block_may_go_and_is_not_untouched() -> None:
    structure = with_blocks(chain(4))
    dense = Policy.dense(structure).array(structure)
    cost = Latency(structure, replace(latency_table(structure), structure=structure.fingerprint))
    assert cost.parts(dense)["untouched"] == pytest.approx(0.0)
    gone = np.array([0 if g.kind == "block" else g.width for g in structure])
    assert sum(cost.parts(gone).values()) == pytest.approx(float(cost(gone)))


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
