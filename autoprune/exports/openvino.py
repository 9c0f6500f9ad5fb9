"""OpenVINO's own format, for Intel's processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.exports import compare, free_batch, other_samples
from autoprune.tracing.tensors_only import TensorsOnly
from autoprune.tracing.to_openvino import EXACT, to_openvino


class Openvino:
    """model.xml, with its weights in model.bin beside it; float32, the batch is free."""

    suffix = "xml"
    packages = ("openvino",)
    extra = "openvino"

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], path: Path) -> list[Tensor]:
        """Write, and run in OpenVINO on the CPU."""
        import openvino

        plain = TensorsOnly(model, inputs).eval()
        _, _, shapes = free_batch(plain, plain.tensors)
        openvino.save_model(to_openvino(plain, shapes), path, compress_to_fp16=False)
        compiled = openvino.Core().compile_model(path, "CPU", EXACT)

        def run(given: tuple[Any, ...]) -> list[Tensor]:
            found = compiled([x.contiguous().numpy() for x in TensorsOnly(model, given).tensors])
            return [torch.from_numpy(found[port].copy()) for port in compiled.outputs]

        if (other := other_samples(model, inputs)) is not None:
            compare(run(other[0]), other[1], path)
        return run(inputs)
