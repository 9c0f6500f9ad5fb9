"""Latency of weights in 8 bits: measured as what the int8 file takes, and in the table's features."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.costs._latency_features import Features
from autoprune.costs._latency_table import OpTimes
from autoprune.families import analyze
from autoprune.latency.whole_models import Clocked, fit_latency
from autoprune.policy import Policy
from autoprune.runtimes.onnxruntime import Onnxruntime
from autoprune.space import Space, restrict
from autoprune.structure import Structure
from autoprune.tracing.copies import copied
from autoprune.tracing.onnx_int8 import as_stored, products
from autoprune.tracing.rounding import round_weights


class Net(nn.Module):
    """Two convolutions, the second of which may be stored in 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 32, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(x).relu()).relu().mean((2, 3))
        return out


INPUTS = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


def made() -> tuple[nn.Module, Structure]:
    torch.manual_seed(0)
    model = Net().eval()
    return model, restrict(analyze(model, INPUTS), Space(bits=(32, 8)))


def test_features_tell_what_is_left_in_float() -> None:
    _, structure = made()
    ops = (
        OpTimes((("first.weight", 1),), (8,), (3,), ((1.0,),)),
        OpTimes((("second.weight", 1),), (32,), (8,), ((3.0,),)),
    )
    features = Features(structure, ops)
    dense = Policy.dense(structure)
    rounded = Policy.of(dense.as_dict() | {"second.weight@bits": 8})
    found = features(np.stack([p.array(structure) for p in (dense, rounded)]))
    assert found["ops"].tolist() == [1.0, 1.0]
    assert found["float_ops"].tolist() == [1.0, 0.25]
    assert found["int8_ops"].tolist() == [1.0, 1.75]


def test_a_structure_without_precisions_has_the_features_of_before() -> None:
    model = Net().eval()
    structure = restrict(analyze(model, INPUTS), Space())
    assert "float_ops" not in Features(structure, (OpTimes((("first.weight", 1),), (8,), (3,), ((1.0,),)),)).names


@pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra autoprune[onnx]",
)
def test_the_runtime_runs_rounded_weights_as_8_bit_products(monkeypatch: pytest.MonkeyPatch) -> None:
    model, structure = made()
    small = copied(model)
    round_weights(small, structure, Policy.dense(structure).as_dict() | {"second.weight@bits": 8})
    stored: list[int] = []

    def seen(graph: bytes, inputs: list[object]) -> bytes:
        found = as_stored(graph, inputs)
        stored.append(len(products(graph).in_8_bits))
        assert (found == graph) == (not products(graph).in_8_bits)
        return found

    monkeypatch.setattr("autoprune.runtimes._onnx_models.as_stored", seen)
    runtime = Onnxruntime()
    outputs = [np.asarray(runtime(m, INPUTS, 1)()) for m in (model, small)]
    assert stored == [0, 1]
    error = np.linalg.norm(outputs[0] - outputs[1]) / np.linalg.norm(outputs[0])
    assert 0 < error < 0.1


@pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra autoprune[onnx]",
)
def test_a_table_is_fitted_over_precisions() -> None:
    model, structure = made()
    table = fit_latency(model, INPUTS, structure, Clocked("onnxruntime", 1, 6), seconds=0.01)
    assert {"float_ops", "int8_ops"} <= set(table.coefficients)
    features = Features(structure, table.ops, tuple(table.coefficients))
    assert all(float(v) == 1.0 for v in features(Policy.dense(structure).array(structure)).values())
