"""ONNX, for onnxruntime and most others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import root_line
from autoprune.exports import compare, free_batch, other_samples
from autoprune.tracing.inputs import batch_size
from autoprune.tracing.quiet import quiet
from autoprune.tracing.tensors_only import TensorsOnly


class Onnx:
    """model.onnx; the tensors among the inputs are its inputs, numbers are constants.

    Written by torch's exporter over torch.export; where that fails, by the older one over TorchScript, and a warning
    says so. The file is run on the inputs, and on other ones with one sample more.
    """

    suffix = "onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], path: Path) -> list[Tensor]:
        """Write, and run in onnxruntime."""
        try:
            return _checked(_by_dynamo, model, inputs, path)
        except Exception as error:  # exporters fail in many ways, and a file may compute something else
            try:
                found = _checked(_by_torchscript, model, inputs, path)
            except Exception:
                raise error from None
            said = root_line(error, 160)
            warnings.warn(
                f"model.onnx is written by the exporter over TorchScript; the newer one: {said}", stacklevel=2
            )
            return found


def _checked(
    write: Callable[[nn.Module, tuple[Any, ...], Path], None], model: nn.Module, inputs: tuple[Any, ...], path: Path
) -> list[Tensor]:
    """What the written file gives for the inputs; for other ones it gives what the model gives."""
    write(model, inputs, path)
    run = session(path)
    if (other := other_samples(model, inputs)) is not None:
        compare(run(TensorsOnly(model, other[0]).tensors), other[1], path)
    return run(TensorsOnly(model, inputs).tensors)


def session(path: Path, threads: int = 0) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What runs an ONNX file on a CPU: tensors in the order of its inputs -> its outputs; 0 threads are all cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    opened = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [spec.name for spec in opened.get_inputs()]

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        feeds: Mapping[str, Any] = {n: x.contiguous().numpy() for n, x in zip(names, tensors, strict=True)}
        return [torch.from_numpy(x) for x in opened.run(None, feeds)]

    return run


def _by_dynamo(model: nn.Module, inputs: tuple[Any, ...], path: Path) -> None:
    positional, keywords, shapes = free_batch(model, inputs)
    taken = (*positional, {}) if positional and isinstance(positional[-1], dict) else positional  # else: keywords
    with quiet():
        program = torch.onnx.export(model, taken, kwargs=keywords, dynamo=True, dynamic_shapes=shapes, verbose=False)
        assert program is not None
        program.save(path)


def _by_torchscript(model: nn.Module, inputs: tuple[Any, ...], path: Path) -> None:
    plain = TensorsOnly(model, inputs).eval()
    names = [f"input_{i}" for i in range(len(plain.tensors))]
    batch = batch_size(inputs)
    free = {n: {0: "batch"} for n, x in zip(names, plain.tensors, strict=True) if x.shape[:1] == (batch,)}
    with quiet():
        torch.onnx.export(plain, plain.tensors, path, dynamo=False, input_names=names, dynamic_axes=free)
