"""A model as a CUDA graph, captured once and replayed: what is left of its time is the GPU's own.

Not tried on hardware: no GPU was at hand when it was written. Its contract runs where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autoprune.tracing.inputs import arguments

WARM_UP = 3
"""Calls before the capture: they choose kernels and make workspaces, which a capture may not."""


class CudaGraphs:
    """Captures one forward pass (Gray 2019, "Getting started with CUDA graphs"); a replay starts all of its kernels.

    A model that waits for the GPU, or whose shapes depend on its data, cannot be captured.
    """

    device = "cuda"

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], threads: int) -> Callable[[], object]:
        """What replays `model` on copies of `inputs`, and waits for the GPU; the processor's threads have no part."""
        given, named = arguments(model, inputs)
        positional, keywords = tree_map(_held, given), tree_map(_held, named)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(WARM_UP):
                model(*positional, **keywords)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            outputs = model(*positional, **keywords)
        held = (model, positional, keywords, outputs)  # the graph reads and writes where these lie

        def replay() -> object:
            graph.replay()
            torch.cuda.synchronize()
            return held[-1]

        return replay

    def operation(self, module: nn.Module, x: Tensor, threads: int) -> Callable[[], object]:
        """A single operation is captured like a model."""
        return self(module, (x,), threads)


def _held(value: Any) -> Any:
    """A tensor of its own, so that nobody moves it away from under the graph."""
    return value.detach().clone() if isinstance(value, Tensor) else value
