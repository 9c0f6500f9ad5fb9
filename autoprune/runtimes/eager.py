"""Torch as it runs a model by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from autoprune.runtimes._torch import torch_runner


def eager(model: nn.Module, inputs: tuple[Any, ...], threads: int) -> Callable[[], object]:
    """Calls the model; who measures has set torch's threads."""
    return torch_runner(model, inputs)
