"""Core ML, for Apple's devices."""

from __future__ import annotations

import contextlib
import io
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.tracing.copies import copied
from autoprune.tracing.inputs import batch_size
from autoprune.tracing.quiet import quiet
from autoprune.tracing.tensors_only import TensorsOnly

LARGEST = 1024
"""Samples that are taken at a time at most; Core ML wants a bound."""


class Coreml:
    """model.mlpackage, a folder: an ML program in float32, batches of 1 to 1024.

    Converted, and not compared: nothing but macOS runs it.
    """

    suffix = "mlpackage"
    packages = ("coremltools",)
    extra = "coreml"

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], path: Path) -> None:
        """Write."""
        with quiet(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():  # it draws bars of its progress
            import coremltools

            plain = TensorsOnly(_in_order(model), inputs).eval()
            tensors = tuple(_laid_out(x) for x in plain.tensors)
            program = torch.export.export(plain, tensors, dynamic_shapes=(_shapes(tensors, batch_size(inputs)),))
            exact = {"convert_to": "mlprogram", "compute_precision": coremltools.precision.FLOAT32}
            try:
                converted = coremltools.convert(program.run_decompositions(), skip_model_load=True, **exact)
            except Exception as error:
                traceback.clear_frames(error.__traceback__)  # its scratch folder would warn when it is collected
                raise
            converted.save(str(path))


def _shapes(tensors: tuple[Tensor, ...], batch: int) -> tuple[dict[int, Any] | None, ...]:
    """The batch is free, from a single sample on, which AUTO would leave out."""
    free = torch.export.Dim("batch", min=1, max=LARGEST)
    return tuple({0: free} if x.shape[:1] == (batch,) else None for x in tensors)


def _in_order(model: nn.Module) -> nn.Module:
    """A copy whose tensors lie in the order of their dimensions: the converter knows no other one."""
    twin = copied(model)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.data = _laid_out(tensor.data)
    return twin


def _laid_out(tensor: Tensor) -> Tensor:
    """A copy in the order of its dimensions, whatever a dimension of size 1 claims of itself."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
