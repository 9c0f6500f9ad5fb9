"""Exported files answer as the eager model does, at other batch sizes too."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import InputError, RunError
from autoprune.exports import check_formats, export
from autoprune.tasks._cifar_resnet import CifarResNet

HAS_ONNX = all(importlib.util.find_spec(p) for p in ("onnx", "onnxscript", "onnxruntime"))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet(8, channels=1, planes=(4, 6, 8)).eval()


def test_a_pt2_file_answers_as_the_eager_model_at_another_batch_size(model: nn.Module, tmp_path: Path) -> None:
    (path,) = export(model, (torch.randn(2, 1, 8, 8),), ["pt2"], tmp_path)
    assert path == tmp_path / "model.pt2"
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(torch.export.load(path).module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not HAS_ONNX, reason="needs the extra autoprune[onnx]")
def test_an_onnx_file_answers_as_the_eager_model_at_another_batch_size(model: nn.Module, tmp_path: Path) -> None:
    import onnxruntime

    (path,) = export(model, (torch.randn(2, 1, 8, 8),), ["onnx"], tmp_path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(5, 1, 8, 8)
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(HAS_ONNX, reason="the extra is installed")
def test_a_missing_extra_is_named_before_any_work() -> None:
    with pytest.raises(InputError, match=r"needs .*onnxruntime.*pip install 'autoprune\[onnx\]'"):
        check_formats(["onnx"])


def test_an_unknown_format_names_the_nearest_one() -> None:
    with pytest.raises(InputError, match="unknown export format 'pt3'; did you mean 'pt2'"):
        check_formats(["pt3"])


def test_exporting_leaves_the_model_in_its_mode(model: nn.Module, tmp_path: Path) -> None:
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, (torch.randn(2, 1, 8, 8),), ["pt2"], tmp_path)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_that_branches_on_its_data_fails_in_one_line(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if bool((x.sum() > 0).item()) else x

    with pytest.raises(RunError, match="cannot export to pt2") as caught:
        export(Branch(), (torch.ones(2, 3),), ["pt2"], tmp_path)
    assert "\n" not in str(caught.value)


def test_a_single_sample_does_not_fix_the_batch(model: nn.Module, tmp_path: Path) -> None:
    (path,) = export(model, (torch.randn(1, 1, 8, 8),), ["pt2"], tmp_path)
    assert torch.export.load(path).module()(torch.randn(5, 1, 8, 8)).shape[0] == 5


def test_inputs_that_no_exporter_takes_apart_are_named(tmp_path: Path) -> None:
    @dataclass
    class Meta:
        scale: float

    with pytest.raises(InputError, match=r"inputs hold a Meta, .*register_dataclass"):
        export(nn.Linear(3, 2), (torch.ones(2, 3), Meta(2.0)), ["pt2"], tmp_path)


def test_a_file_whose_outputs_differ_is_refused_and_one_that_nobody_can_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="differ from the eager model's by 1 "):
        export(nn.Linear(3, 2), (torch.ones(2, 3),), [f"{__name__}:Wrong"], tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match="nothing here can run it"):
        (path,) = export(nn.Linear(3, 2), (torch.ones(2, 3),), [f"{__name__}:Blind"], tmp_path)
    assert (path.name, path.read_text()) == ("model.txt", "as it is")


class Blind:
    suffix = ".txt"

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], path: Path) -> Any:
        path.write_text("as it is")
        return None


class Wrong(Blind):
    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], path: Path) -> Any:
        super().__call__(model, inputs, path)
        return 2 * model(*inputs)


class Careful(nn.Module):
    """Looks at its data before it answers, always to the same end: torch.export refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if bool((x.abs().sum() > 0).item()) else -y


class Moody(Careful):
    """As above, and it does change its mind."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if bool((x[0, 0] > 0).item()) else -y


@pytest.mark.skipif(not HAS_ONNX, reason="needs the extra autoprune[onnx]")
def test_the_older_exporter_steps_in_and_a_file_that_holds_for_its_example_alone_is_refused(tmp_path: Path) -> None:
    import onnxruntime

    model, x = Careful().eval(), torch.tensor([[1.0, 2.0, 3.0], [-1.0, 1.0, 1.0]])
    with pytest.warns(UserWarning, match="written by the exporter over TorchScript; the newer one: .*ata-dependent"):
        (path,) = export(model, (x,), ["onnx"], tmp_path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: torch.cat([x] * 3).numpy()})[0])
    torch.testing.assert_close(got, model(torch.cat([x] * 3)))
    with pytest.raises(RunError, match="cannot export to onnx"):
        export(Moody().eval(), (x,), ["onnx"], tmp_path / "moody")
    assert not list((tmp_path / "moody").iterdir())
