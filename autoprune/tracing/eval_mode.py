"""How a model runs for a while: in eval mode, or without a cache; all is as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode and without gradients inside the `with`."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """A model of transformers gives no cache inside the `with`: an object that no exporter takes apart."""
    held = [getattr(module, "config", None) for module in model.modules()]
    configs: list[Any] = [config for config in held if getattr(config, "use_cache", None) is True]
    try:
        for config in configs:
            config.use_cache = False
        yield
    finally:
        for config in configs:
            config.use_cache = True
