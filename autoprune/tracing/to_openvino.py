"""A torch model as OpenVINO's, for what is exported and what is timed."""

from __future__ import annotations

from typing import Any

import torch

from autoprune.tracing.quiet import quiet
from autoprune.tracing.tensors_only import TensorsOnly

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
"""What keeps OpenVINO from computing in bfloat16 where the processor has it."""


def to_openvino(plain: TensorsOnly, shapes: Any = None) -> Any:
    """`plain`, in eval mode, as an `openvino.Model` over torch.export; dynamic `shapes` are free, the rest is fixed."""
    import openvino

    with quiet(), torch.no_grad():
        dynamic = None if shapes is None else (shapes,)
        return openvino.convert_model(torch.export.export(plain, plain.tensors, dynamic_shapes=dynamic))
