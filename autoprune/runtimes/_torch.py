"""One call of a module by torch: what eager and compiled models share."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import nn

from autoprune.tracing.inputs import arguments


def torch_runner(
    model: nn.Module, inputs: tuple[Any, ...], called: Callable[..., Any] | None = None
) -> Callable[[], object]:
    """One call of `model`, or of what it was `called` into, without gradients; then it waits for the device."""
    run, (positional, keywords) = called or model, arguments(model, inputs)
    tensor = next(chain(model.parameters(), model.buffers()), None)
    wait = _waiting(torch.device("cpu") if tensor is None else tensor.device)

    def once() -> None:
        with torch.inference_mode():
            run(*positional, **keywords)
        wait()

    return once


def _waiting(device: torch.device) -> Callable[[], None]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type == "mps":
        return torch.mps.synchronize
    return lambda: None
