"""ONNX, for onnxruntime and most others."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.exports import free_batch


class Onnx:
    """model.onnx; the tensors among the inputs are its inputs, numbers are constants."""

    suffix = "onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], path: Path) -> list[Tensor]:
        """Write, and run in onnxruntime."""
        import onnxruntime

        positional, keywords, shapes = free_batch(model, inputs)
        taken = (*positional, {}) if positional and isinstance(positional[-1], dict) else positional  # else: keywords
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns about its own internals
            program = torch.onnx.export(
                model, taken, kwargs=keywords, dynamo=True, dynamic_shapes=shapes, verbose=False
            )
            assert program is not None
            program.save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        tensors = [x for x in tree_leaves((positional, keywords)) if isinstance(x, Tensor)]
        feeds = {spec.name: x.contiguous().numpy() for spec, x in zip(session.get_inputs(), tensors, strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, feeds)]
