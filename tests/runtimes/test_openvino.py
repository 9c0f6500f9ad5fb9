"""OpenVINO as a runtime: it computes what the model does, whole and one operation at a time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from autoprune.files.machine import usable_cores
from autoprune.latency.runtime_here import resolve
from autoprune.runtimes.openvino import Openvino
from tests.families import FAMILIES
from tests.transformer_models import MODELS

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ("openvino", "onnx")), reason="needs the extra autoprune[openvino]"
)


def given_by(run: Callable[[], Any]) -> torch.Tensor:
    return torch.from_numpy(next(iter(run().values())).copy())


def test_a_network_and_a_transformer_answer_as_in_torch() -> None:
    net, inputs = FAMILIES["projection"].build().eval(), FAMILIES["projection"].inputs(1)
    bert, example = MODELS["bert"].build().eval(), MODELS["bert"].example()
    with torch.no_grad():
        wanted = net(*inputs), bert(**example)[0]
    made = Openvino()
    torch.testing.assert_close(given_by(made(net, inputs, 1)), wanted[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(given_by(made(bert, (example,), 1)), wanted[1], rtol=1e-3, atol=1e-4)
    assert bert.config.use_cache is MODELS["bert"].build().config.use_cache


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), (1, 6, 9, 9)),
        (nn.Conv2d(8, 8, 3, padding="same", groups=8, bias=False), (2, 8, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5)),
        (nn.Conv1d(3, 5, 4, dilation=2), (1, 3, 20)),
        (nn.Linear(6, 4), (2, 6)),
        (nn.Linear(6, 4, bias=False), (2, 3, 6)),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, nn.Module) else None,
)
def test_an_operation_answers_as_in_torch(module: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with torch.no_grad():
        wanted = module.eval()(x)
    torch.testing.assert_close(given_by(Openvino().operation(module, x, 1)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(usable_cores() < 2, reason="one core")
@pytest.mark.parametrize("threads", [1, 2])
def test_it_is_given_just_the_threads_of_the_job(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    compiled, compile_model = [], openvino.Core.compile_model

    def noted(*given: Any) -> Any:
        compiled.append(compile_model(*given))
        return compiled[-1]

    monkeypatch.setattr(openvino.Core, "compile_model", noted)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    resolve("openvino", torch.device("cpu"), threads).load(model, (torch.randn(1, 3, 8, 8),))()
    (found,) = compiled
    assert found.get_property("INFERENCE_NUM_THREADS") == threads
    assert found.get_property("NUM_STREAMS") == 1
    assert str(found.get_property("INFERENCE_PRECISION_HINT")) == "<Type: 'float32'>"
