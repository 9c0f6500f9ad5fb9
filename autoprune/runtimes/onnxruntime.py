"""onnxruntime on the CPU, each model exported, or re-cut from the first one's graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from autoprune.runtimes._onnx_models import OnnxFamily, operation, session_runner
from autoprune.runtimes._vectors import floats_a_vector


class Onnxruntime:
    """The first model that it meets is exported, its slim copies are cut out of that graph where this works."""

    device = "cpu"
    packages = ("onnx", "onnxscript", "onnxruntime")

    def __init__(self) -> None:
        self._family: OnnxFamily | None = None

    @property
    def step(self) -> int:
        """Channels of a block of its convolutions (MLAS, NCHWc): those of a vector.

        With AVX-512 3x3 convolutions of 33 to 48 of 64 channels all took .60 to .62 of the dense time, and one of 32
        took .37.
        """
        return floats_a_vector()

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], threads: int) -> Callable[[], object]:
        """A session for `model`."""
        if self._family is None:
            self._family = OnnxFamily(model, inputs)
        return self._family.load(model, threads)

    def operation(self, module: nn.Module, x: Tensor, threads: int) -> Callable[[], object]:
        """A session for one convolution or linear layer, its graph built by hand."""
        return session_runner(operation(module, x), (x,), threads)
