"""A pruned model to files for deployment: ONNX and torch.export (pt2), each checked against the eager outputs."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import InputError, RunError, did_you_mean
from autoprune.tracing.eval_mode import evaluating

TOLERANCE = 1e-3
"""Largest relative error of an exported model's outputs; other kernels add up in another order."""


def export(model: nn.Module, example_inputs: tuple[Tensor, ...], formats: Sequence[str], out: Path) -> list[Path]:
    """Write `out`/model.onnx and `out`/model.pt2 as asked; the batch dimension stays free; the model is untouched.

    Raises:
        InputError: an unknown format, or an extra that is not installed.
        RunError: the model cannot be exported, or the file's outputs differ from the eager ones.
    """
    chosen = check_formats(formats)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    with evaluating(model):
        wanted = _first_tensor(model(*example_inputs))
        for name in chosen:
            path = out / f"model.{name}"
            try:
                got = _FORMATS[name](model, example_inputs, path)
            except Exception as error:  # exporters fail in many ways; each means that this model cannot be exported
                reason = next(iter(str(error).strip().splitlines()), "no message")
                raise RunError(f"cannot export to {name}: {type(error).__name__}: {reason}") from error
            difference = float((got - wanted).norm() / wanted.norm().clamp_min(1e-12))
            if not difference <= TOLERANCE:
                raise RunError(f"{path}: its outputs differ from the eager model's by {difference:.2g} (relative)")
            files.append(path)
    return files


def check_formats(formats: Sequence[str]) -> tuple[str, ...]:
    """The formats, each once; InputError for an unknown one or a missing extra, before any work is done."""
    for name in formats:
        if name not in _FORMATS:
            raise InputError(f"unknown export format {name!r}; {did_you_mean(name, _FORMATS)}")
    needs = ("onnx", "onnxscript", "onnxruntime") if "onnx" in formats else ()
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f"export to onnx needs {', '.join(missing)}: pip install 'autoprune[onnx]'")
    return tuple(dict.fromkeys(formats))


def _pt2(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export warns about its own internals
        program = torch.export.export(model, inputs, dynamic_shapes=_free_batch(inputs))
        torch.export.save(program, path)
        return _first_tensor(torch.export.load(path).module()(*inputs))


def _onnx(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> Tensor:
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=_free_batch(inputs), verbose=False)
        assert program is not None
        program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {spec.name: x.contiguous().numpy() for spec, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


def _free_batch(inputs: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
    """Dimension 0 of every input may be any size; AUTO lets torch fix it where the model insists."""
    return tuple({0: torch.export.Dim.AUTO} for _ in inputs)


def _first_tensor(value: Any) -> Tensor:
    """The first tensor of a model's output, whatever tree it comes in."""
    while not isinstance(value, Tensor):
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return value


_FORMATS: dict[str, Callable[[nn.Module, tuple[Tensor, ...], Path], Tensor]] = {"onnx": _onnx, "pt2": _pt2}
