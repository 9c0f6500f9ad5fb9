"""The contract of every file in autoprune/exports."""

from __future__ import annotations

import copy
import importlib.util
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune import plugins
from autoprune.exports import export
from autoprune.protocols import Export


class Scaled(nn.Module):
    """Takes a tensor, a number and perhaps a 0-dim tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: float = 1.0, shift: Tensor | None = None) -> Tensor:
        y: Tensor = self.linear(x) * scale
        return y if shift is None else y + shift


class Named(Scaled):
    """Takes one dict."""

    def forward(self, batch: dict[str, Any]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["x"], batch.get("scale", 1.0))


pytestmark = pytest.mark.filterwarnings("ignore:.*nothing here can run it")
X = torch.linspace(-1, 1, 8).reshape(2, 4)


@pytest.fixture(params=plugins.names("exports"))
def name(request: pytest.FixtureRequest) -> str:
    packages = getattr(plugins.load("exports", request.param), "packages", ())
    if any(importlib.util.find_spec(package) is None for package in packages):
        pytest.skip("its packages are not installed")
    return str(request.param)


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_the_file_bears_its_suffix_and_the_model_is_untouched(name: str, tmp_path: Path, umask: None) -> None:
    made: Export = plugins.load("exports", name)()
    model = Scaled().train()
    state = copy.deepcopy(model.state_dict())
    (path,) = export(model, (X,), [name], tmp_path)
    assert path == tmp_path / f"model.{made.suffix.lstrip('.')}"
    for written in (path, *path.rglob("*")):  # a format may be a folder
        assert stat.S_IMODE(written.stat().st_mode) == (0o750 if written.is_dir() else 0o640)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert model.training
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Scaled(), (X[:1],)),
        (Scaled(), (X, 2, torch.tensor(0.5))),
        (Scaled(), {"x": X, "scale": 2.0}),
        (Named(), {"x": X, "scale": 2}),
    ],
    ids=["a single sample", "a number and a 0-dim tensor", "keywords", "a dict"],
)
def test_inputs_as_people_have_them_are_exported(name: str, model: nn.Module, inputs: Any, tmp_path: Path) -> None:
    assert export(model, inputs, [name], tmp_path)[0].stat().st_size > 0
