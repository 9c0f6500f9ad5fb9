"""Exports, one file a format: what a model is written as for deployment. Here they are called and compared."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoprune import plugins
from autoprune.errors import InputError, RunError, root_line
from autoprune.protocols import Export
from autoprune.tracing.copies import float_tensors
from autoprune.tracing.eval_mode import evaluating, without_cache
from autoprune.tracing.inputs import arguments, batch_size, call_model, example_tuple

TOLERANCE = 1e-3
"""Largest relative error of an exported model's outputs; other kernels add up in another order."""
PLAIN = (Tensor, np.ndarray, int, float, str, type(None))
"""What exporters take apart, beside tuples, lists and dicts of it."""


def export(model: nn.Module, example_inputs: Any, formats: Sequence[str], out: Path) -> list[Path]:
    """Write `out`/model.SUFFIX for each format and compare; the batch dimension stays free; the model is untouched.

    A format is a file of this folder or a user's "module:Class".

    Raises:
        InputError: an unknown format, an extra that is not installed, or inputs that no exporter takes apart.
        RunError: the model cannot be exported, or the file's outputs differ from the eager ones.
    """
    chosen = check_formats(formats)
    check_inputs(example_inputs)
    out.mkdir(parents=True, exist_ok=True)
    with evaluating(model), without_cache(model):
        inputs = two_samples(model, example_inputs)
        wanted = call_model(model, inputs)
        return [_written(name, model, inputs, wanted, out) for name in chosen]


def other_samples(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], Any] | None:
    """(inputs, what the model gives for them): one sample more, and other ones; None where the model takes none such.

    A file that holds for its example alone, or for its batch size alone, is found by them.
    """
    given = example_tuple(inputs)
    batch = batch_size(given)

    def other(value: Any) -> Any:
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        if not (isinstance(tensor, Tensor) and tensor.shape[:1] == (batch,)):
            return value
        turned = torch.cat([tensor, tensor[:1]]).flip(0)
        return turned * 0.75 if turned.is_floating_point() else turned

    changed = tuple(tree_map(other, given))
    try:
        with torch.no_grad():
            found, before = (float_tensors(call_model(model, x)) for x in (changed, given))
    except Exception:  # a model may refuse another number of samples in any way
        return None
    grown = [x.shape[:1] == (batch + 1,) for x, y in zip(found, before, strict=False) if y.shape[:1] == (batch,)]
    return (changed, found) if grown and all(grown) else None


def check_formats(formats: Sequence[str]) -> tuple[str, ...]:
    """The formats, each once; InputError for an unknown or unfit one or a missing extra, before any work is done."""
    for name in formats:
        with plugins.before_work():
            _exporter(name)
        packages = getattr(plugins.load("exports", name), "packages", ())
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            extra = getattr(plugins.load("exports", name), "extra", "onnx")
            raise InputError(f"export to {name} needs {', '.join(missing)}: pip install 'autoprune[{extra}]'")
    return tuple(dict.fromkeys(formats))


def check_inputs(inputs: Any) -> None:
    """Raise InputError where example inputs hold what no exporter takes apart, such as a dataclass."""
    for leaf in tree_leaves(example_tuple(inputs)):
        if not isinstance(leaf, PLAIN):
            kind = type(leaf).__name__
            raise InputError(
                f"--export: the model's inputs hold a {kind}, which no exporter takes apart: give tensors and numbers "
                f"in tuples, lists and dicts, or call torch.export.register_dataclass({kind}) first"
            )


def two_samples(model: nn.Module, inputs: Any) -> tuple[Any, ...]:
    """The inputs; a single sample twice, where the model takes that: of one alone, an exporter makes a constant."""
    given = example_tuple(inputs)
    if batch_size(given) != 1:
        return given

    def double(value: Any) -> Any:
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        return torch.cat([tensor] * 2) if isinstance(tensor, Tensor) and tensor.shape[:1] == (1,) else value

    doubled = tuple(tree_map(double, given))
    try:
        one, two = (float_tensors(call_model(model, x)) for x in (given, doubled))
    except Exception:  # a model may refuse two samples in any way
        return given
    wanted = [(2 * x.shape[0], *x.shape[1:]) for x in one if x.dim()]
    return doubled if wanted and wanted == [tuple(x.shape) for x in two] else given


def free_batch(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """(arguments, keywords, dynamic shapes) for torch's exporters: dimension 0 of what is as long as the batch is free.

    AUTO lets torch fix it where the model insists.
    """
    positional, keywords = arguments(model, inputs)
    batch = batch_size(inputs)

    def shape(value: Any) -> dict[int, Any] | None:
        return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.shape[:1] == (batch,) else None

    return positional, keywords, tree_map(shape, keywords) if keywords else tuple(tree_map(shape, positional))


def _exporter(name: str) -> Export:
    found = plugins.load("exports", name)
    if not isinstance(found, type):
        raise plugins.broken("exports", name, f"is a {type(found).__name__}")
    with plugins.calling("exports", name):
        made: Export = found()
    plugins.check_has("exports", name, made, "suffix", "__call__")
    return made


def _written(name: str, model: nn.Module, inputs: tuple[Any, ...], wanted: Any, out: Path) -> Path:
    made = _exporter(name)
    target = out / f"model.{made.suffix.lstrip('.')}"
    with _beside(target) as draft:
        try:
            got = made(model, inputs, draft)
        except Exception as error:  # exporters fail in many ways; each means that this model cannot be exported
            raise RunError(f"cannot export to {name}: {root_line(error)}") from error
        if got is None:
            warnings.warn(f"{target.name} is written, but nothing here can run it, so it is not compared", stacklevel=3)
        else:
            compare(got, wanted, target)
    return target


def compare(got: Any, wanted: Any, target: Path) -> None:
    """RunError where the outputs of the file are not the eager ones."""
    pairs = list(zip(float_tensors(got), float_tensors(wanted), strict=False))
    if not pairs:
        raise RunError(f"{target.name}: it gives no outputs to compare with the eager model's")
    for mine, eager in pairs:
        if mine.shape != eager.shape:
            raise RunError(f"{target.name}: its outputs are {list(mine.shape)}, the eager model's {list(eager.shape)}")
        difference = float((mine.double() - eager.double()).norm() / eager.double().norm().clamp_min(1e-12))
        if not difference <= TOLERANCE:
            raise RunError(f"{target.name}: its outputs differ from the eager model's by {difference:.2g} (relative)")


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Where to write instead of `target`: at the end all of it takes its place, with the permissions of a new file."""
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as folder:
        probe = Path(folder, "new")
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        yield Path(folder, target.name)
        for made in Path(folder).iterdir():
            place = target.with_name(made.name)
            for file in (made, *made.rglob("*")):
                file.chmod(mode | (mode & 0o444) >> 2 if file.is_dir() else mode)  # who may read may enter
            if place.is_dir():  # a format that is a folder, written before
                shutil.rmtree(place)
            os.replace(made, place)
