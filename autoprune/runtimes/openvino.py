"""OpenVINO on the CPU, each model converted as an export to it is."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from autoprune.runtimes._onnx_models import operation
from autoprune.runtimes._vectors import floats_a_vector
from autoprune.tracing.eval_mode import without_cache
from autoprune.tracing.tensors_only import TensorsOnly
from autoprune.tracing.to_openvino import EXACT, to_openvino


class Openvino:
    """float32, compiled for latency: one request at a time, on as many threads as it is given."""

    device = "cpu"
    packages = ("openvino", "onnx")
    extra = "openvino"

    @property
    def step(self) -> int:
        """Channels of a block of its convolutions (oneDNN, nChw16c): those of a vector."""
        return floats_a_vector()

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], threads: int) -> Callable[[], object]:
        """What runs `model` for inputs of just these shapes."""
        plain = TensorsOnly(model, inputs).eval()
        with without_cache(model):
            return _runner(to_openvino(plain), plain.tensors, threads)

    def operation(self, module: nn.Module, x: Tensor, threads: int) -> Callable[[], object]:
        """One convolution or linear layer, read from a graph of ONNX that is built by hand: a tenth of a second."""
        import openvino

        return _runner(openvino.Core().read_model(io.BytesIO(operation(module, x))), (x,), threads)


def _runner(model: Any, tensors: Sequence[Tensor], threads: int) -> Callable[[], object]:
    """A request of the compiled model, and its feeds."""
    import openvino

    hints = {**EXACT, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(model, "CPU", hints).create_infer_request()
    feeds = [x.detach().contiguous().numpy() for x in tensors]

    def run() -> object:
        return request.infer(feeds, share_inputs=True, share_outputs=True)

    return run
