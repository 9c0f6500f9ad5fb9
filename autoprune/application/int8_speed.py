"""Why an 8-bit file is not faster than the float one, as far as the processor and the file tell."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import torch

from autoprune.files.machine import processor_flags

EIGHT_BIT = (
    "QLinearConv",
    "QLinearMatMul",
    "QGemm",
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
)
FLOAT = ("Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm")
ROUNDING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
VNNI = frozenset({"avx512_vnni", "avx_vnni"})


def has_vnni() -> bool:
    """Whether the processor multiplies 8-bit numbers into 32 bits at once: by its flags, else by what torch says."""
    if flags := processor_flags():
        return bool(flags & VNNI)
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(supported is not None and supported())


def slow_words(path: Path) -> str:
    """Why the 8-bit file at `path` does not pay here: the processor, what stays in float, what rounding takes."""
    ran = operations(path)
    eight, floats, rounding = (sum(ran[name] for name in names) for names in (EIGHT_BIT, FLOAT, ROUNDING))
    said = [] if has_vnni() else ["this processor has no VNNI, the instructions that multiply 8-bit numbers"]
    if floats:
        left = ", ".join(f"{ran[name]} {name}" for name in FLOAT if ran[name])
        said.append(f"onnxruntime computes {floats} of its {floats + eight} products in float ({left})")
    both = f"{eight} products in 8 bits and {rounding} operations that round to 8 bits or back"
    return "; ".join([*said, f"{both} take no less time at these sizes"])


def operations(path: Path) -> Counter[str]:
    """How many operations of each kind onnxruntime makes of an ONNX file here: what can be fused to 8 bits is."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder, "optimised.onnx"))
        options.log_severity_level = 4
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)
