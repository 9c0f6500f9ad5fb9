"""An exported ONNX file with 8-bit weights and activations, by onnxruntime's own quantiser."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import RunError, root_line
from autoprune.exports import TensorsOnly
from autoprune.exports.onnx import session
from autoprune.protocols import Task
from autoprune.tracing.inputs import first_samples

INT8 = "model.int8.onnx"
SAMPLES = 128
"""Of the calibration split, from which the ranges of activations are found."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Quantised:
    """The file and the way: static (ranges found beforehand) or dynamic (found as it runs)."""

    path: Path
    way: str


def quantise(exported: Path, model: nn.Module, task: Task) -> Quantised:
    """model.int8.onnx beside `exported`, the ONNX file of `model`.

    A network of convolutions gets fixed ranges from calibration data, kept as pairs of QuantizeLinear and
    DequantizeLinear; any other, such as a transformer, finds those of activations as it runs. Activations are unsigned,
    weights are signed, a scale a channel; where the processor has no VNNI they take 7 bits, for its products of two
    8-bit numbers would overflow.

    Raises:
        RunError: onnxruntime's quantiser does not take the file.
    """
    static = any(isinstance(module, CONVOLUTIONS) for module in model.modules())
    target = exported.with_name(INT8)
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            ready = _prepared(exported, Path(folder) / "prepared.onnx")
            (_static if static else _dynamic)(ready, target, model, task)
    except Exception as error:  # the quantiser fails in many ways; each means: not this file
        said = f"cannot quantise {exported.name}: {root_line(error, 200)}; leave --int8 out"
        raise RunError(said) from error
    return Quantised(target, "static" if static else "dynamic")


class OnnxModel(nn.Module):
    """An ONNX file as a module that is called like the model it comes from; it gives its first output."""

    def __init__(self, path: Path, model: nn.Module, threads: int = 1) -> None:
        super().__init__()
        self._run, self._like = session(path, threads), [model]  # in a list: no submodule of this one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs, the first one alone or as a tuple where there are several."""
        given = TensorsOnly(self._like[0], (kwargs,) if kwargs else args).tensors
        found = self._run([t.cpu() for t in given])
        return found[0] if len(found) == 1 else tuple(found)


def has_vnni() -> bool:
    """Whether the processor multiplies 8-bit numbers into 32 bits at once."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(supported is not None and supported())


def _prepared(path: Path, target: Path) -> Path:
    """With shapes inferred and norms folded, as the quantiser wants it; as it is where that fails."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        quant_pre_process(str(path), str(target), skip_symbolic_shape=True)
    except Exception:  # it helps and is not needed
        return path
    return target


def _dynamic(path: Path, target: Path, model: nn.Module, task: Task) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kinds = {"per_channel": True, "reduce_range": not has_vnni(), "weight_type": QuantType.QInt8}
    quantize_dynamic(str(path), str(target), op_types_to_quantize=["MatMul", "Gemm"], **kinds)


def _static(path: Path, target: Path, model: nn.Module, task: Task) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    names = _input_names(path)
    kinds = {"per_channel": True, "reduce_range": not has_vnni(), "quant_format": QuantFormat.QDQ}
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(str(path), str(target), _reader(names, model, task), **kinds, **types)


def _input_names(path: Path) -> list[str]:
    import onnx

    return [value.name for value in onnx.load(path, load_external_data=False).graph.input]


def _reader(names: Sequence[str], model: nn.Module, task: Task) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = _feeds(names, model, task)

        def get_next(self) -> Mapping[str, Any] | None:
            return next(self._feeds, None)

    return Reader()


def _feeds(names: Sequence[str], model: nn.Module, task: Task) -> Iterator[Mapping[str, Any]]:
    """What the model is called with for samples of the calibration split, a batch at a time."""
    seen = 0
    for batch in task.split("calibration"):
        for tensors in called_with(model, task, batch):
            few = first_samples(tensors, SAMPLES - seen) if len(tensors[0]) > SAMPLES - seen else tensors
            seen += len(few[0])
            yield {name: t.detach().cpu().contiguous().numpy() for name, t in zip(names, few, strict=True)}
        if seen >= SAMPLES:
            return


def called_with(model: nn.Module, task: Task, batch: Any) -> list[tuple[Tensor, ...]]:
    """The tensors of every call of `model` while the task asks for its outputs on a batch."""
    calls: list[tuple[Tensor, ...]] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(TensorsOnly(module, (dict(kwargs),) if kwargs else args).tensors)

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            task.outputs(model, batch)
    finally:
        hook.remove()
    return calls
