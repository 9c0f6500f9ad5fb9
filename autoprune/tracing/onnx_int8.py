"""8-bit products in an ONNX graph, by onnxruntime's own quantiser; which of them a search has rounded."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoprune.files.machine import processor_flags
from autoprune.tracing.rounding import is_rounded

VNNI = frozenset({"avx512_vnni", "avx_vnni"})
FOLDED = 1e-4
"""By how much a norm that was folded into a weight may have shifted its numbers, relative to each."""
PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
Feeds = Iterator[Mapping[str, Any]]
"""What a graph is run with, by the names of its inputs, to find the ranges of its activations."""


@dataclass(frozen=True)
class Products:
    """Names of the operations with a weight of 8-bit integers, and of all other products."""

    in_8_bits: tuple[str, ...]
    in_float: tuple[str, ...]
    convolutions: bool
    """Whether at least half of those in 8 bits are convolutions."""


def has_vnni() -> bool:
    """Whether the processor multiplies 8-bit numbers into 32 bits at once: by its flags, else by what torch says."""
    if flags := processor_flags():
        return bool(flags & VNNI)
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(supported is not None and supported())


def products(file: Path | bytes) -> Products:
    """Of an ONNX file or its content, by the numbers in its weights.

    Those that were rounded are integers with a scale an output. A norm that was folded into one only scales its rows.
    """
    import onnx
    from onnx import numpy_helper

    graph = (onnx.load_from_string(file) if isinstance(file, bytes) else onnx.load(file)).graph
    weights = {constant.name: constant for constant in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in PRODUCTS]
    rounded = [
        node
        for node in nodes
        if node.input[1] in weights
        and is_rounded(torch.tensor(numpy_helper.to_array(weights[node.input[1]])), _outputs_of(node), FOLDED)
    ]
    convolutions = sum(node.op_type.startswith("Conv") for node in rounded)
    return Products(
        tuple(node.name for node in rounded),
        tuple(node.name for node in nodes if node not in rounded),
        2 * convolutions >= len(rounded),
    )


def write_int8(path: Path, target: Path, feeds: Feeds | None, kept: Sequence[str]) -> None:
    """Quantise the file `path` but for the products called `kept`, a scale an output.

    With `feeds` the ranges of activations are fixed by these (pairs of QuantizeLinear and DequantizeLinear), else they
    are found as it runs, of linear layers alone. Where the processor has no VNNI weights take 7 bits, for its products
    of two 8-bit numbers would overflow.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    kinds = {"per_channel": True, "reduce_range": not has_vnni(), "nodes_to_exclude": [*kept]}
    kinds["weight_type"] = QuantType.QInt8
    if feeds is None:
        quantize_dynamic(str(path), str(target), op_types_to_quantize=["MatMul", "Gemm"], **kinds)
        return
    fixed = {"activation_type": QuantType.QUInt8, "quant_format": QuantFormat.QDQ}
    quantize_static(str(path), str(target), _reader(feeds), **fixed, **kinds)


def as_stored(graph: bytes, inputs: Sequence[Any]) -> bytes:
    """The graph with its rounded weights as 8-bit products, or as it is where it has none.

    `inputs`, arrays, go through once to fix the ranges, for the time that they take does not depend on them.
    """
    if not products(graph).in_8_bits:
        return graph
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        path, target = Path(folder, "model.onnx"), Path(folder, "int8.onnx")
        path.write_bytes(graph)
        ready = prepared(path, Path(folder, "prepared.onnx"))
        found = products(ready)
        feeds = iter([dict(zip(input_names(ready), inputs, strict=True))]) if found.convolutions else None
        write_int8(ready, target, feeds, found.in_float)
        return target.read_bytes()


def prepared(path: Path, target: Path) -> Path:
    """With shapes inferred and norms folded, as the quantiser wants it; as it is where that fails."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        quant_pre_process(str(path), str(target), skip_symbolic_shape=True)
    except Exception:  # it helps and is not needed
        return path
    return target


def input_names(path: Path) -> list[str]:
    """Names of a file's inputs, in order."""
    import onnx

    return [value.name for value in onnx.load(path, load_external_data=False).graph.input]


def _outputs_of(node: Any) -> int:
    """The dimension of a product's weight that counts its outputs."""
    if node.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return 0 if node.op_type == "Conv" else 1


def _reader(feeds: Feeds) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Mapping[str, Any] | None:
            return next(feeds, None)

    return Reader()
