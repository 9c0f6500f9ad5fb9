"""onnxruntime on the CPU, each model exported, or re-cut from the first one's graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from autoprune.runtimes._onnx_models import OnnxFamily, operation, session_runner


class Onnxruntime:
    """The first model that it meets is exported, its slim copies are cut out of that graph where this works."""

    device = "cpu"
    packages = ("onnx", "onnxscript", "onnxruntime")

    def __init__(self) -> None:
        self._family: OnnxFamily | None = None

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], threads: int) -> Callable[[], object]:
        """A session for `model`."""
        if self._family is None:
            self._family = OnnxFamily(model, inputs)
        return self._family.load(model, threads)

    def operation(self, module: nn.Module, x: Tensor, threads: int) -> Callable[[], object]:
        """A session for one convolution or linear layer, its graph built by hand."""
        return session_runner(operation(module, x), (x,), threads)
