"""Proof by experiment: a slim model must equal the dense one whose consumers read zeros from the removed channels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.errors import RunError, one_line
from autoprune.structure import Group, Structure
from autoprune.tracing.copies import copied, flat_output, private_copy, quiet_random_state, to_double
from autoprune.tracing.inputs import call_model, few_samples
from autoprune.tracing.slim import Keep, expected_attributes, kept_positions, named_tensors, removed_positions
from autoprune.tracing.sound_gradients import SoundGradients

ABSENT = 0.25
"""Share of the blocks that a random policy leaves out."""

TOLERANCE = 1e-5
"""Largest relative error between a slim model and its masked reference."""


def verify(slim_model: nn.Module, dense: nn.Module, structure: Structure, keep: Keep, example_inputs: Any) -> float:
    """Relative error of `slim_model` against its masked reference, in fp64 where they run in it; both stay untouched.

    Also audits the attributes and runs backward once.

    Raises:
        RunError: the slim model does not run, differs by more than 1e-5, has an attribute that does not agree with its
            tensors, or a gradient that is missing or not finite.
    """
    audit(slim_model)
    reference = masked(dense, slim_model, structure, keep)
    inputs = few_samples(reference, example_inputs).inputs
    small = private_copy(slim_model)
    try:
        with quiet_random_state(0):
            _check_backward(small, inputs)
        error = relative_error(_run_exactly(small, inputs), _run_exactly(reference, inputs))
    except RuntimeError as crash:  # torch reports shapes that do not fit so
        raise RunError(f"the pruned model does not run ({one_line(crash)})") from crash
    if not error <= TOLERANCE:
        raise RunError(f"the pruned model differs from its masked reference by {error:.2g} (allowed: {TOLERANCE:.0e})")
    return error


def masked(dense: nn.Module, slim_model: nn.Module, structure: Structure, keep: Keep) -> nn.Module:
    """A copy of `dense` that holds the tensors of `slim_model` at their kept positions; consumers read zeros elsewhere.

    Tensors that only the slim model has (a bias that a repair added) are scattered into zeros.
    """
    twin = private_copy(dense)
    targets, sources = named_tensors(twin), named_tensors(slim_model)
    shapes = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    kept = kept_positions(structure, keep, shapes)
    removed = removed_positions(structure, keep, shapes, "consume")
    with torch.no_grad():
        for name in sources.keys() - targets.keys():
            _add_bias(twin, name, sources[name], shapes, kept)
        targets = named_tensors(twin)
        for (tensor, dim), gone in removed.items():
            targets[tensor].index_fill_(dim, torch.nonzero(gone).flatten().to(targets[tensor].device), 0)
        for name, source in sources.items():
            target = targets[name]
            where = [kept.get((name, d)) for d in range(target.dim())]
            fits = tuple(n if k is None else len(k) for k, n in zip(where, target.shape, strict=True))
            if tuple(source.shape) != fits:
                raise RunError(f"{name!r} is {tuple(source.shape)} in the pruned model, by its policy it is {fits}")
            _scatter(target, source, where)
    return twin


def audit(model: nn.Module) -> None:
    """Raise RunError unless in_channels, out_features, num_features and the like agree with the tensors."""
    for name, module in model.named_modules():
        for attribute, value in expected_attributes(module):
            if getattr(module, attribute) != value:
                raise RunError(f"{name}.{attribute} is {getattr(module, attribute)}, its tensors say {value}")


def run(model: nn.Module, inputs: Any) -> Tensor:
    """The model's floating outputs in one flat tensor, the same ones at every call."""
    with quiet_random_state(0), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flat_output(call_model(model, inputs))


def relative_error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference|; inf where the shapes differ or a value is not finite."""
    if value.shape != reference.shape or not bool(torch.isfinite(value).all()):
        return float("inf")
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))


def random_keep(groups: Sequence[Group], rng: np.random.Generator) -> dict[str, tuple[int, ...]]:
    """A random width of the grid below the dense one and random atoms for every group; all where there is none.

    Odd if that can be, lest a fixed split fits by luck.
    """
    keep: dict[str, tuple[int, ...]] = {}
    for group in groups:
        if group.kind == "block":  # most stay, or little else is left to look at
            keep[group.name] = () if rng.random() < ABSENT else (0,)
            continue
        if group.matrices:
            keep[group.name] = tuple(range(int(rng.choice(group.grid))))
            continue
        lower = [w for w in group.grid if w < group.width] or [group.width]
        width = rng.choice([w for w in lower if w % 2] or lower)
        keep[group.name] = tuple(sorted(int(a) for a in rng.permutation(group.width)[:width]))
    return keep


def _run_exactly(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    try:
        return run(copied(model).double(), to_double(inputs))
    except RuntimeError:  # a model that builds its own fp32 constants does not run in fp64
        return run(model, inputs)


def _scatter(target: Tensor, source: Tensor, kept: Sequence[Tensor | None]) -> None:
    """target[kept of every dim] = source."""
    if source.dim() == 0:
        target.copy_(source)
        return
    where = [torch.arange(n) if k is None else k for k, n in zip(kept, source.shape, strict=True)]
    index = torch.meshgrid(*(w.to(target.device) for w in where), indexing="ij")
    target[index] = source.to(target.device, target.dtype)


def _add_bias(
    model: nn.Module,
    name: str,
    source: Tensor,
    shapes: Mapping[str, tuple[int, ...]],
    kept: dict[tuple[str, int], Tensor],
) -> None:
    """Give a conv or linear of the dense model the bias that only its slim copy has: zeros, to be scattered into."""
    owner, _, attribute = name.rpartition(".")
    module = dict(model.named_modules()).get(owner)
    weight = f"{owner}.weight" if owner else "weight"
    if attribute != "bias" or weight not in shapes or not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        raise RunError(f"the pruned model has a tensor {name!r} that the dense model lacks")
    transposed = getattr(module, "transposed", False)
    if transposed and module.groups != 1:
        raise RunError(f"the pruned model has a bias {name!r} that the dense grouped transposed convolution lacks")
    dim = 1 if transposed else 0
    module.bias = nn.Parameter(torch.zeros(shapes[weight][dim], dtype=source.dtype, device=source.device))
    if (weight, dim) in kept:
        kept[name, 0] = kept[weight, dim]


def _check_backward(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """One backward pass of a private copy; by `backward`, for reentrant checkpoints refuse `autograd.grad`."""
    with SoundGradients(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = flat_output(call_model(model, inputs))
        if not output.requires_grad:
            raise RunError("no gradient flows through the pruned model")
        output.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            raise RunError(f"the pruned model gives {name!r} a gradient that is not finite")
