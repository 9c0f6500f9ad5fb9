"""Core ML: what is converted takes batches from one sample on, and says that nobody has run it."""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autoprune.exports import export
from autoprune.tasks._cifar_resnet import CifarResNet
from tests.transformer_models import MODELS

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("coremltools") is None, reason="needs the extra autoprune[coreml]"),
    pytest.mark.filterwarnings("ignore:.*nothing here can run it"),
]


def described(path: Path) -> Any:
    from coremltools.models.utils import load_spec

    return load_spec(str(path)).description


def test_a_network_is_converted_with_a_free_batch_and_what_stood_there_is_replaced(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CifarResNet(8, channels=1, planes=(4, 6, 8)).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    laid_out = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 1, 8, 8).to(memory_format=torch.channels_last)
    (tmp_path / "model.mlpackage" / "of before").mkdir(parents=True)
    with pytest.warns(UserWarning, match="model.mlpackage is written, but nothing here can run it"):
        (path,) = export(model, (x,), ["coreml"], tmp_path)
    assert {p.name for p in path.iterdir()} >= {"Manifest.json", "Data"}
    assert not (path / "of before").exists()
    found = described(path)
    (given,) = found.input
    sizes = [(r.lowerBound, r.upperBound) for r in given.type.multiArrayType.shapeRange.sizeRanges]
    assert sizes == [(1, 1024), (1, 1), (8, 8), (8, 8)]
    assert len(found.output) == 1
    assert {name: tensor.stride() for name, tensor in model.state_dict().items()} == laid_out


def test_a_transformer_is_converted_in_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, inputs = MODELS["bert"].build().eval(), MODELS["bert"].example()
    (path,) = export(model, inputs, ["coreml"], tmp_path)
    found = described(path)
    assert len(found.input) == len(inputs)
    assert [len(i.type.multiArrayType.shape) for i in found.input] == [2] * len(inputs)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_what_cannot_be_converted_is_one_line(tmp_path: Path) -> None:
    from autoprune.errors import RunError

    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(RunError, match="cannot export to coreml: ") as caught:
        export(Own(), (torch.ones(2, 3),), ["coreml"], tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    del caught
    gc.collect()  # a scratch folder that was left open would warn here, and a warning fails the test
