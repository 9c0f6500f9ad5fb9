"""torch.compile, one graph for each model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from autoprune.runtimes._torch import torch_runner

COMPILED = 4096
"""Models that dynamo may hold at a time; beyond its own limit it would run them uncompiled, without a word."""


def compile(model: nn.Module, inputs: tuple[Any, ...], threads: int) -> Callable[[], object]:  # its name
    """Compiles the model; single operations are timed eagerly, since thousands of them would take hours."""
    import torch._dynamo

    limits = torch._dynamo.config.patch(recompile_limit=COMPILED, accumulated_recompile_limit=COMPILED)
    with limits, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler warns about its own internals
        run = torch_runner(model, inputs, torch.compile(model, dynamic=False))
        run()
    return run
