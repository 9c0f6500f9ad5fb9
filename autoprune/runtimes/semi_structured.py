"""Two of every four weights on an NVIDIA GPU: its sparse tensor cores multiply only those that are not zero.

Not tried on hardware: no such GPU was at hand when it was written. Its contract runs where there is one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autoprune.runtimes._torch import torch_runner
from autoprune.tracing.copies import copied
from autoprune.tracing.patterns import follows

KEPT, OF = 2, 4
LEAST = (8, 0)
"""Compute capability from which on GPUs have sparse tensor cores (Ampere)."""
MEANT = 0.05
"""Share of zeros from which on a weight is meant to be sparse."""
SIXTEEN = (torch.float16, torch.bfloat16)


class SemiStructured:
    """A copy of the model in 16 bits whose linear layers with the pattern 2:4 are `to_sparse_semi_structured`.

    A model that is in bfloat16 stays so, any other is in float16. Layers without zeros, and convolutions, which torch
    has no such product for, are dense, so that a dense model runs as eager does in 16 bits (Mishra et al. 2021).
    """

    device = "cuda"

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], threads: int) -> Callable[[], object]:
        """Calls the copy; the processor's threads have no part.

        Raises:
            RuntimeError: the GPU has no sparse tensor cores, or a layer has zeros and not the pattern.
        """
        check_patterns(model)
        if torch.version.cuda is None or torch.cuda.get_device_capability() < LEAST:
            raise RuntimeError("2:4 needs an NVIDIA GPU of compute capability 8.0 or more, and there is none here")
        kind = next((p.dtype for p in model.parameters() if p.dtype in SIXTEEN), torch.float16)
        half = copied(model).to(kind).eval()
        for layer in half.modules():
            if type(layer) is nn.Linear and follows(layer.weight, KEPT, OF):
                _compress(layer)
        return torch_runner(half, tree_map(lambda x: _as(x, kind), inputs))

    def operation(self, module: nn.Module, x: Tensor, threads: int) -> Callable[[], object]:
        """A single layer is a model of one."""
        return self(module, (x,), threads)


def check_patterns(model: nn.Module) -> None:
    """RuntimeError in one line where a linear layer has zeros, and not 2:4: it would run dense, without a word.

    Rows and columns that are zero as a whole, dead neurons, do not count.
    """
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear and not follows(layer.weight, KEPT, OF):
            kept = layer.weight.detach() != 0
            alive = kept[kept.any(1)][:, kept.any(0)]
            if (share := 1.0 - float(alive.float().mean())) >= MEANT:
                raise RuntimeError(
                    f"{share:.0%} of {name or 'the layer'}'s weights are zero, and not at least {OF - KEPT} of every "
                    f"{OF} inputs: search with granularity 2:4"
                )


def _compress(layer: nn.Linear) -> None:
    """Its weight as the GPU takes it; sizes that no kernel takes stay dense."""
    from torch.sparse import to_sparse_semi_structured

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it a prototype
        try:
            weight = to_sparse_semi_structured(layer.weight.detach())
        except RuntimeError:  # rows or columns that do not divide
            return
    layer.weight = nn.Parameter(weight, requires_grad=False)


def _as(value: Any, kind: torch.dtype) -> Any:
    return value.to(kind) if isinstance(value, Tensor) and value.is_floating_point() else value
