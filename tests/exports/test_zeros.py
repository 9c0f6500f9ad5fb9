"""Zeros of a pruned model are in every file that it is written as: counted after a round trip."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.application.int8 import quantise
from autoprune.exports import export
from autoprune.tracing.patterns import follows
from autoprune.tracing.rounding import nearest
from tests.small import RandomTask

HAS_ONNX = all(importlib.util.find_spec(p) for p in ("onnx", "onnxscript", "onnxruntime"))
INPUTS = (torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)),)


class Net(nn.Module):
    """Convolutions before norms, which exporters fold, one that nothing follows, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(4, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 24, 3)
        self.hidden, self.head = nn.Linear(24, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.norm(self.stem(x)).relu()).relu().mean((2, 3))
        out: Tensor = self.head(self.hidden(x).relu())
        return out


@pytest.fixture
def model() -> nn.Module:
    """Half of every four inputs of each layer are zero, and its norm is no identity."""
    torch.manual_seed(0)
    made = Net().eval()
    with torch.no_grad():
        made.norm.weight.uniform_(0.5, 2.0)
        made.norm.running_var.uniform_(0.5, 2.0)
        made.norm.running_mean.normal_()
        for layer in (made.stem, made.wide, made.hidden, made.head):
            runs = layer.weight.movedim(1, -1).unflatten(-1, (-1, 4))
            mask = torch.zeros_like(runs).scatter_(-1, runs.abs().topk(2, -1).indices, 1.0)
            layer.weight.copy_((runs * mask).flatten(-2).movedim(-1, 1))
            assert follows(layer.weight, 2, 4)
    return made


def zeros_of(model: nn.Module) -> list[tuple[int, int]]:
    """(numbers, zeros) of every weight, ascending."""
    weights = (p.detach() for p in model.parameters() if p.dim() > 1)
    return sorted((w.numel(), w.numel() - int(w.count_nonzero())) for w in weights)


def counted(arrays: Iterator[np.ndarray]) -> list[tuple[int, int]]:
    return sorted((a.size, a.size - np.count_nonzero(a)) for a in arrays)


def test_pt2_keeps_the_very_zeros(model: nn.Module, tmp_path: Path) -> None:
    (path,) = export(model, INPUTS, ["pt2"], tmp_path)
    held = torch.export.load(path).state_dict
    for name, weight in model.named_parameters():
        assert torch.equal(held[name], weight)
    assert zeros_of(torch.export.load(path).module()) == zeros_of(model)


@pytest.mark.skipif(not HAS_ONNX, reason="needs the extra autoprune[onnx]")
def test_onnx_keeps_them_whatever_it_folds(model: nn.Module, tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    (path,) = export(model, INPUTS, ["onnx"], tmp_path)
    arrays = [numpy_helper.to_array(c) for c in onnx.load(path).graph.initializer]
    assert counted(a for a in arrays if a.ndim > 1 and a.dtype == np.float32) == zeros_of(model)


@pytest.mark.skipif(not HAS_ONNX, reason="needs the extra autoprune[onnx]")
def test_the_int8_file_keeps_them(model: nn.Module, tmp_path: Path) -> None:
    """Integers around 0, so that zeros stay; small numbers become zeros beside them, never the other way."""
    import onnx
    from onnx import numpy_helper

    for layers in (("stem", "wide"), ("hidden", "head")):
        net = model if layers[0] == "stem" else nn.Sequential(model.hidden, nn.ReLU(), model.head).eval()
        task = RandomTask(net, (4, 6, 6) if net is model else (24,))
        (path,) = export(net, task.example_inputs(), ["onnx"], tmp_path)
        found = quantise(path, net, task, task.example_inputs())
        assert found.way == ("static" if net is model else "dynamic")
        held = [numpy_helper.to_array(c) for c in onnx.load(found.path).graph.initializer]
        integers = {a.size: a for a in held if a.dtype == np.int8 and a.ndim > 1}
        for name in layers:
            weight = model.get_parameter(f"{name}.weight").detach()
            stored = torch.from_numpy(integers[weight.numel()].copy())
            stored = stored if stored.shape == weight.shape else stored.T
            assert bool((stored[weight == 0] == 0).all())
            assert int((stored == 0).sum()) < 0.55 * weight.numel()
            assert float((stored.sign() == weight.sign()).float().mean()) > 0.95


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs the extra autoprune[openvino]")
def test_openvino_keeps_them_whatever_it_folds(model: nn.Module, tmp_path: Path) -> None:
    import openvino

    (path,) = export(model, INPUTS, ["openvino"], tmp_path)
    graph = openvino.Core().read_model(path)
    constants = [op for op in graph.get_ordered_ops() if op.get_type_name() == "Constant"]
    arrays = [np.array(op.data) for op in constants if op.get_element_type() == openvino.Type.f32]
    sizes = {size for size, _ in zeros_of(model)}
    assert counted(a for a in arrays if a.size in sizes) == zeros_of(model)


def test_numbers_that_8_bits_hold_keep_their_zeros(model: nn.Module) -> None:
    for weight in (p.detach() for p in model.parameters() if p.dim() > 1):
        assert bool((nearest(weight).weight[weight == 0] == 0).all())
