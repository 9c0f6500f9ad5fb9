"""An exported ONNX file with 8-bit weights and activations, by onnxruntime's own quantiser."""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from autoprune.database.batches import prepare
from autoprune.errors import InputError, RunError, root_line
from autoprune.exports.onnx import session
from autoprune.protocols import Task
from autoprune.tracing.eval_mode import evaluating, without_cache
from autoprune.tracing.inputs import arguments, call_model, first_samples
from autoprune.tracing.onnx_int8 import input_names, prepared, products, write_int8

INT8 = "model.int8.onnx"
SAMPLES = 128
"""Of the calibration split, from which the ranges of activations are found."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Quantised:
    """The file and the way: static (ranges found beforehand) or dynamic (found as it runs)."""

    path: Path
    way: str


def quantise(exported: Path, model: nn.Module, task: Task, inputs: Any, *, chosen: bool = False) -> Quantised:
    """model.int8.onnx beside `exported`, the ONNX file that `model` with its example `inputs` was written as.

    Where a search has `chosen` precisions, only the products whose weights it has rounded to 8 bits are quantised.

    A network whose products lie mostly in convolutions gets fixed ranges from calibration data, kept as pairs of
    QuantizeLinear and DequantizeLinear; any other, such as a transformer, finds those of activations as it runs.
    Activations are unsigned,
    weights are signed, a scale a channel; where the processor has no VNNI they take 7 bits, for its products of two
    8-bit numbers would overflow.

    Raises:
        RunError: onnxruntime's quantiser does not take the file, or no weight was rounded.
    """
    target = exported.with_name(INT8)
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            ready = prepared(exported, Path(folder) / "prepared.onnx")
            kept = products(ready) if chosen else None
            if kept is not None and not kept.in_8_bits:
                raise RunError(
                    "the point stores no weight in 8 bits, so there is nothing to quantise; leave --int8 out"
                )
            static = convolves(model, inputs) if kept is None else kept.convolutions
            feeds = _feeds(input_names(ready), model, task, inputs) if static else None
            write_int8(ready, target, feeds, () if kept is None else kept.in_float)
    except RunError:
        raise
    except Exception as error:  # the quantiser fails in many ways; each means: not this file
        said = f"cannot quantise {exported.name}: {root_line(error, 200)}; leave --int8 out"
        raise RunError(said) from error
    return Quantised(target, "static" if static else "dynamic")


class OnnxModel(nn.Module):
    """An ONNX file as a module that is called like the model it comes from, and answers in the same form.

    `inputs` are the example inputs that the file was written with: they give its inputs their order.
    """

    def __init__(self, path: Path, model: nn.Module, inputs: Any, threads: int = 1) -> None:
        super().__init__()
        self._run, self._like, self._inputs = session(path, threads), [model], inputs  # in a list: no submodule
        self._form: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the file computes, in the model's own form of outputs."""
        model = self._like[0]
        found = self._run([t.cpu() for t in in_order(model, self._inputs, args, kwargs)])
        if self._form is None:
            with evaluating(model), without_cache(model):
                self._form = tree_flatten(model(*args, **kwargs))
        leaves, form = self._form
        given = iter(found)
        return tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves], form)


def in_order(model: nn.Module, inputs: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The tensors of a call in the order that example `inputs` have them in, however the call passes them.

    Raises:
        InputError: the call does not pass what the example does.
    """
    positional, keywords = arguments(model, inputs)
    signature = inspect.signature(model.forward)
    names, bound = [*signature.parameters][: len(positional)], signature.bind(*args, **kwargs)
    names += [*keywords]
    given = {**bound.arguments, **next((v for k, v in bound.arguments.items() if k == "kwargs"), {})}
    lacking = [name for name in names if name not in given]
    if lacking:
        raise InputError(f"the task calls the model without {lacking[0]!r}, which its example inputs have")
    return tuple(x for x in tree_leaves([given[name] for name in names]) if isinstance(x, Tensor))


def convolves(model: nn.Module, inputs: Any) -> bool:
    """Whether most products of weights are those of convolutions."""
    counted = {True: 0, False: 0}

    def count(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor) and isinstance(module.weight, Tensor):
            rows = out.numel() // max(1, module.weight.shape[0])
            counted[isinstance(module, CONVOLUTIONS)] += rows * module.weight.numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))]
    try:
        with evaluating(model), without_cache(model):
            call_model(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return counted[True] > counted[False]


def _feeds(names: Sequence[str], model: nn.Module, task: Task, inputs: Any) -> Iterator[Mapping[str, Any]]:
    """What the model is called with for samples of the calibration split, a batch at a time."""
    seen = 0
    for batch in task.split("calibration"):
        for tensors in called_with(model, task, prepare(batch, torch.device("cpu")), inputs):
            few = first_samples(tensors, SAMPLES - seen) if len(tensors[0]) > SAMPLES - seen else tensors
            seen += len(few[0])
            yield {name: t.detach().cpu().contiguous().numpy() for name, t in zip(names, few, strict=True)}
        if seen >= SAMPLES:
            return


def called_with(model: nn.Module, task: Task, batch: Any, inputs: Any) -> list[tuple[Tensor, ...]]:
    """The tensors of every call of `model` while the task asks for its outputs on a batch, in the order of `inputs`."""
    calls: list[tuple[Tensor, ...]] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(in_order(module, inputs, args, kwargs))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            task.outputs(model, batch)
    finally:
        hook.remove()
    return calls
