"""The whole way of each recovery that moves zeros, on the network of the digits: in seconds, and it helps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autoprune.recovery import build_recovery
from autoprune.tasks.digits import Digits
from tests.small import nonzeros, thin

DENSITY, STEPS = 0.15, 60
OWN: Mapping[str, Mapping[str, Any]] = {"rigl": {"every": 10, "norm_statistics": "running"}}


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, nn.Module]:
    task = Digits()
    return task, task.build()


def accuracy(task: Digits, model: nn.Module) -> float:
    with torch.no_grad():
        return task.metrics(model, task.split("validation"))["accuracy"]


@pytest.mark.parametrize("name", ["gradual", "rigl", "lottery"])
def test_a_network_of_few_weights_learns_the_digits_again(
    name: str, digits: tuple[Digits, nn.Module], tmp_path: Path
) -> None:
    task, dense = digits
    small = thin(copy.deepcopy(dense), DENSITY)
    given, before = nonzeros(small), accuracy(task, small)
    options = {"learning_rate": 0.03, "weight_decay": 5e-4, **OWN.get(name, {})}
    if name == "lottery":  # the checkpoint of an earlier step than the last one is the dense model's own here
        save_file({k: v.contiguous() for k, v in dense.state_dict().items()}, tmp_path / "early.safetensors")
        options |= {"weights": tmp_path / "early.safetensors", "rounds": 1}
    made = build_recovery(name, options).begun(small, dense, task, STEPS, 0)
    for progress in made:
        if name == "rigl":
            assert nonzeros(small) == given, progress.step
    assert nonzeros(small) == given
    assert accuracy(task, small) > max(0.85, before + 0.1)
