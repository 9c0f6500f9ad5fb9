"""What a model is called with: example inputs as people have them, and how few of them tell the truth."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import MappingKey, tree_flatten_with_path, tree_leaves, tree_map

from autoprune.errors import InputError
from autoprune.tracing.copies import float_tensors, quiet_random_state, unwrapped


@dataclass(frozen=True, slots=True)
class Example:
    """Inputs as a tuple of arguments, and how many samples they are: 1 where dimension 0 is not the sample."""

    inputs: tuple[Any, ...]
    samples: int


def call_model(model: nn.Module, inputs: Any) -> Any:
    """What `model` returns for `inputs`: a tuple or list of arguments, a dict, or one tensor.

    A dict (alone, or as the only argument) is passed as keywords where `forward` has parameters of these names, else
    as one argument. numpy arrays become tensors, float64 inputs follow the model's type.
    """
    positional, keywords = arguments(model, inputs)
    return model(*positional, **keywords)


def arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of one call of `model` on `inputs`."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)

    def fitting(value: Any) -> Any:
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        wide = isinstance(tensor, Tensor) and tensor.dtype == torch.float64
        return tensor.to(first.dtype) if wide and first is not None else tensor

    given = tuple(tree_map(fitting, _plain(inputs)))
    if len(given) == 1 and isinstance(given[0], dict) and _takes(model, given[0]):
        return (), given[0]
    return given, {}


def example_tuple(inputs: Any) -> tuple[Any, ...]:
    """Example inputs as a tuple of arguments; a dict is one of them.

    Raises:
        InputError: they are one tensor or something else, or hold no tensor with a sample.
    """
    if not isinstance(inputs, tuple | list | Mapping):
        raise InputError(
            f"example_inputs must be a tuple of the model's arguments, or a dict of them, not a "
            f"{type(inputs).__name__}: write (x,)"
        )
    given = _plain(inputs)
    batch_size(given)
    return given


def few_samples(model: nn.Module, inputs: Any, n: int = 2) -> Example:
    """Detached copies of the first `n` samples of `inputs`, or of all where dimension 0 is not truly the sample.

    An experiment tells: a sample's outputs are the same whatever its batch, and lie along dimension 0. Lists of
    images, clips folded into the batch and graphs fail it. `model` is in eval mode and comes back untouched.

    Raises:
        InputError: as `example_tuple`.
    """
    given = example_tuple(inputs)
    batch = batch_size(given)
    if batch == 1:
        return Example(_resized(given, 1), 1)
    few = _resized(given, min(n, batch))
    # two samples cannot be cut, but they can be doubled
    more = _resized(given, 2 * batch) if batch <= n else _resized(given, min(2 * n, batch))
    if _same_samples(model, few, more):
        return Example(few, min(n, batch))
    return Example(_resized(given, batch), 1)


def first_samples(inputs: Any, n: int) -> tuple[Any, ...]:
    """Detached copies of the first `n` samples of `inputs`, as a tuple of arguments."""
    return _resized(example_tuple(inputs), n)


def batch_size(inputs: Any) -> int:
    """Dimension 0 of the first tensor of `inputs`.

    Raises:
        InputError: there is no tensor with a batch dimension.
    """
    for leaf in tree_leaves(_plain(inputs)):
        if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim and leaf.shape[0]:
            return int(leaf.shape[0])
    raise InputError("example_inputs must hold a tensor whose dimension 0 is the sample, and at least one sample")


def described(inputs: Any) -> tuple[dict[str, Any], ...]:
    """Shape and type of every tensor of example inputs, in order, and the name of those that have one."""
    found = []
    for path, leaf in tree_flatten_with_path(_plain(inputs))[0]:
        if not isinstance(leaf, Tensor | np.ndarray):
            continue
        names = [str(part.key) for part in path if isinstance(part, MappingKey)]
        named = {"name": ".".join(names)} if names else {}
        found.append({**named, "shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")})
    return tuple(found)


def on_device(inputs: Any, device: torch.device | str) -> Any:
    """The same tree with its tensors on `device`."""
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs)


def _plain(inputs: Any) -> tuple[Any, ...]:
    """Arguments as a tuple; mappings of any kind become dicts, which a tree is made of."""
    given = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    return tuple(dict(x) if isinstance(x, Mapping) else x for x in given)


def _takes(model: nn.Module, named: Mapping[Any, Any]) -> bool:
    """Whether `forward` can be called with `named` as keywords; a wrapper takes what the model inside takes."""
    try:
        inspect.signature(unwrapped(model).forward).bind(**named)
    except (TypeError, ValueError):
        return False
    return bool(named)


def _resized(inputs: tuple[Any, ...], n: int) -> tuple[Any, ...]:
    """Detached copies of the first `n` samples of all inputs that are as long as the batch, or of these repeated."""
    batch = batch_size(inputs)

    def resize(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if not isinstance(value, Tensor):
            return value
        held = value.detach()
        if held.dim() and held.shape[0] == batch:
            held = held[:n] if n <= batch else torch.cat([held] * (n // batch))
        return held.clone(memory_format=torch.preserve_format)

    return tuple(tree_map(resize, inputs))


def _same_samples(model: nn.Module, few: tuple[Any, ...], more: tuple[Any, ...]) -> bool:
    """Whether the outputs of `few` are the first ones of those of `more`."""
    counts = batch_size(few), batch_size(more)
    try:
        with quiet_random_state(0), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small, large = (float_tensors(call_model(model, x)) for x in (few, more))
    except Exception:  # the user's forward may refuse another number of samples in any way
        return False
    if len(small) != len(large) or not small:
        return False
    for one, two in zip(small, large, strict=True):
        if not one.dim() or (one.shape[0], two.shape[0]) != counts or one.shape[1:] != two.shape[1:]:
            return False
        first = two[: counts[0]]
        # kernels round differently by the size of a batch
        if not float((one - first).norm()) <= torch.finfo(one.dtype).eps ** 0.5 * float(first.norm()):
            return False
    return True
