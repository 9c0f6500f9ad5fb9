"""Copies of a lent model that may be traced, cut and scattered without the original noticing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoprune.errors import InputError, one_line


def private_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode whose floating parameters all want gradients and have none.

    Raises:
        InputError: the model cannot be copied.
    """
    # Hook-based weight_norm keeps a computed, non-leaf `weight`, which deepcopy refuses: hand it over as a constant.
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:  # a user's module may refuse in any way
        raise InputError(
            f"{type(model).__name__} cannot be copied: {one_line(error)}; it must survive copy.deepcopy"
        ) from error
    for parameter in twin.parameters():
        parameter.grad = None
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(True)
    return twin.eval()


def first_samples(inputs: Sequence[Any], n: int) -> tuple[Any, ...]:
    """Detached copies of the first `n` samples of every input whose dimension 0 is the batch."""
    batch = batch_size(inputs)

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shortened = value[:n] if value.dim() and value.shape[0] == batch else value
        return shortened.detach().clone(memory_format=torch.preserve_format)

    return tuple(tree_map(cut, tuple(inputs)))


def batch_size(inputs: Sequence[Any]) -> int:
    """Samples in `inputs`: dimension 0 of the first tensor.

    Raises:
        InputError: there is no tensor with a batch dimension.
    """
    for leaf in tree_leaves(tuple(inputs)):
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0]:
            return int(leaf.shape[0])
    raise InputError("example_inputs must hold a tensor whose dimension 0 is the sample, and at least one sample")


def to_double(value: Any) -> Any:
    """A tree with its floating tensors in fp64; rounding then never hides a wrong position."""
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)


def flat_output(value: Any) -> Tensor:
    """All floating tensors of a model's output in one flat tensor."""
    tensors = float_tensors(value)
    return torch.cat([t.reshape(-1).double() for t in tensors]) if tensors else torch.zeros(0)


def float_tensors(value: Any) -> list[Tensor]:
    """The floating tensors in a tree of outputs; objects that are no tree are searched through their attributes."""
    found = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    if not found and hasattr(value, "__dict__"):
        found = [leaf for leaf in tree_leaves(dict(vars(value))) if isinstance(leaf, Tensor)]
    return [t for t in found if t.is_floating_point()]


@contextmanager
def quiet_random_state(seed: int) -> Iterator[None]:
    """A forward pass that draws numbers draws the same ones, and the global torch generators do not notice."""
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        yield
