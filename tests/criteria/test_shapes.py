"""Weights of every make are scored in their own shape: functional, shared, of GPT-2, transposed, in a whole encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoprune
from autoprune import plugins
from autoprune.database.batches import Parts, StatisticsOnly
from autoprune.families import analyze
from autoprune.matrices import weights_of
from autoprune.protocols import Task, WeightCriterion
from tests.transformer_models import MODELS

OF_WEIGHTS = [n for n in plugins.names("criteria") if isinstance(plugins.load("criteria", n)(), WeightCriterion)]


class Bare(nn.Module):
    """Weights that no layer of torch owns, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(8, 6, generator=draws) / 3)
        self.shared = nn.Parameter(torch.randn(8, 8, generator=draws) / 3)
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, generator=draws) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.first).relu()
        x = F.linear(F.linear(x, self.shared).relu(), self.shared).relu()
        x = F.conv1d(F.pad(x.unflatten(1, (2, 4)), (0, 0, 0, 1)), self.kernel, padding=1)
        return x.flatten(1)


def task_on(model: nn.Module, *inputs: Any) -> StatisticsOnly:
    """Batches of these inputs, and what the outputs should be: zeros."""
    batches = [(x, torch.zeros(len(x["input_ids"]) if isinstance(x, dict) else len(x))) for x in inputs]
    splits: dict[str, Any] = dict.fromkeys(("calibration", "validation", "train", "test"), batches)
    task = autoprune.task(model, splits, lambda out, _: _first(out).square().mean(), lambda out, _: {"none": 0.0})
    return StatisticsOnly(task, Parts.of(task, 16, 4).statistics, 4)


def _first(out: Any) -> Tensor:
    found = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    return out.last_hidden_state if found is None else found


def scores_of(name: str, model: nn.Module, names: list[str], task: Task) -> dict[str, Tensor]:
    found = plugins.load("criteria", name)().weights(model, names, task)
    assert {n: s.shape for n, s in found.items()} == {n: model.get_parameter(n).shape for n in names}
    assert all(bool(torch.isfinite(s).all()) for s in found.values())
    assert all(bool(s.any()) for s in found.values())
    return dict(found)


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_weights_that_no_layer_owns(name: str) -> None:
    model = Bare()
    task = task_on(model, *torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(1)))
    scores_of(name, model, ["first", "shared", "kernel"], task)


def test_wanda_adds_up_what_a_shared_weight_reads() -> None:
    model = Bare()
    task = task_on(model, *torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        x = torch.cat([F.linear(b[0], model.first).relu() for b in task.split("calibration")])
        both = x.square().sum(0) + F.linear(x, model.shared).relu().square().sum(0)
        assert torch.allclose(scores_of("wanda", model, ["shared"], task)["shared"], model.shared.abs() * both.sqrt())


def test_a_tied_weight_has_the_same_scores_under_both_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(self.one(x).relu())
            return out

    torch.manual_seed(0)
    model = Tied()
    task = task_on(model, *torch.randn(4, 4, 6))
    for name in set(OF_WEIGHTS) - {"random"}:
        found = scores_of(name, model, ["one.weight", "two.weight"], task)
        assert torch.equal(found["one.weight"], found["two.weight"]), name


@pytest.mark.parametrize("name", OF_WEIGHTS)
@pytest.mark.parametrize("family", ["gpt2", "torch_encoder"])
def test_transformers(family: str, name: str) -> None:
    small = MODELS[family]
    model, example = small.build(), small.example()
    if isinstance(example, dict):
        batches = [{k: torch.cat([v, v]) for k, v in example.items()}] * 4
    else:
        batches = [torch.cat([example[0]] * 2)] * 4
    task = task_on(model, *batches)
    structure = analyze(model, task.example_inputs())
    names = [spec.name for _, spec in weights_of(structure)]
    found = scores_of(name, model, names, task)
    if family == "gpt2":
        assert found["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128), "inputs first"
    groups = [g for g in structure if g.narrows]
    atoms = plugins.load("criteria", name)()(model, groups, task)
    assert {n: s.shape for n, s in atoms.items()} == {g.name: (g.width,) for g in groups}
    assert all(bool(torch.isfinite(s).all()) for s in atoms.values())
