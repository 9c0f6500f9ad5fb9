"""Proof by experiment: a slim model must equal the dense one whose consumers read zeros from the removed channels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.allocation.polynomial import macs_polynomial
from autoprune.errors import InputError, RunError, one_line
from autoprune.policy import Policy
from autoprune.structure import Group, Op, Structure
from autoprune.tracing.copies import flat_output, private_copy, quiet_random_state, to_double
from autoprune.tracing.inputs import Example, call_model, few_samples
from autoprune.tracing.ops import count_macs
from autoprune.tracing.slim import Keep, expected_attributes, kept_positions, named_tensors, removed_positions, slim
from autoprune.tracing.sound_gradients import SoundGradients

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
        for name, source in sources.items():
            target = targets[name]
            for (tensor, dim), gone in removed.items():
                if tensor == name:
                    target.index_fill_(dim, torch.nonzero(gone).flatten().to(target.device), 0)
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


def relative_error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference|; inf where the shapes differ or a value is not finite."""
    if value.shape != reference.shape or not bool(torch.isfinite(value).all()):
        return float("inf")
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))


@dataclass(frozen=True)
class Certifier:
    """Holds the scrambled fp64 twin of a model, on which each group must prove itself.

    The weights are scrambled because a fresh residual branch often ends in a zero scale: it would prove anything.
    """

    model: nn.Module
    example: Example
    ops: tuple[Op, ...]
    dense: Tensor
    tolerance: float

    @staticmethod
    def of(model: nn.Module, example: Example, ops: tuple[Op, ...], rng: np.random.Generator) -> Certifier:
        """Certifier of `model`; in fp64, or as it is where the model insists on its own precision."""
        plain = private_copy(model)
        tries = [(True, True), (False, True), (True, False), (False, False)]
        for scrambled, double in tries:
            twin, given = copy.deepcopy(plain), example.inputs
            if double:
                twin, given = twin.double(), to_double(given)
            if scrambled:
                _scramble(twin, rng)
            try:
                out = _run(twin, given)
            except Exception:  # a model that builds its own fp32 constants does not run in fp64
                continue
            if out.numel() and bool(torch.isfinite(out).all()) and float(out.norm()) > 0:
                return Certifier(twin, replace(example, inputs=given), ops, out, 1e-8 if double else 1e-4)
        raise InputError(f"{type(model).__name__} gives no finite floating output on its example inputs")

    def complaint(self, groups: Sequence[Group], rng: np.random.Generator, count: bool = False) -> str:
        """Prune all `groups` at random widths; what went wrong, in a user's words, or "" if they are proved.

        With `count` their MACs are counted too and must follow the polynomial.
        """
        structure = Structure(tuple(groups), self.ops, fingerprint="experiment")
        for _ in range(3):  # by chance the removed channels may be dead on these inputs
            keep = random_keep(groups, rng)
            with _borrowed(self.model):
                _zero_consumers(self.model, structure, keep)
                expected = _run(self.model, self.example.inputs)
            with _borrowed(self.model):
                try:
                    slim(self.model, structure, keep)
                    got = _run(self.model, self.example.inputs)
                except Exception as crash:  # wrong coupling shows as a shape error anywhere in the user's forward
                    return f"the model does not run once its channels are removed ({one_line(crash)})"
                wrong = self._wrong_macs(structure, keep) if count else ""
            error = relative_error(got, expected)
            if not error <= self.tolerance:
                return f"removing its channels is not the same as masking them (relative error {error:.2g})"
            if wrong:
                return wrong
            if relative_error(expected, self.dense) > 1e3 * max(error, 1e-15):
                return ""
        return "removing its channels changes nothing in the output, so nothing can be proved"

    def _wrong_macs(self, structure: Structure, keep: Mapping[str, Sequence[int]]) -> str:
        policy = Policy.of({name: len(kept) for name, kept in keep.items()})
        expected = int(macs_polynomial(structure)(policy.array(structure)))
        counted = count_macs(self.model, self.example.inputs, self.example.samples)
        return "" if expected == counted else f"its MACs do not follow its width ({counted}, expected {expected})"


@contextmanager
def _borrowed(model: nn.Module) -> Iterator[None]:
    """Whatever is cut or zeroed inside is whole again afterwards; without a copy, for that would dominate the time."""
    contents = [(tensor, tensor.data) for tensor in named_tensors(model).values()]
    attributes = [(m, name, getattr(m, name)) for m in model.modules() for name, _ in expected_attributes(m)]
    try:
        yield
    finally:
        for tensor, data in contents:
            tensor.data = data
        for module, name, value in attributes:
            setattr(module, name, value)


def random_keep(groups: Sequence[Group], rng: np.random.Generator) -> dict[str, tuple[int, ...]]:
    """A random width below the dense one and random atoms for every group; odd, lest a fixed split fits by luck."""
    keep = {}
    for group in groups:
        width = min(int(rng.integers(1, group.width)) | 1, group.width - 1)
        keep[group.name] = tuple(sorted(int(a) for a in rng.permutation(group.width)[:width]))
    return keep


def _run(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    with quiet_random_state(0), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flat_output(call_model(model, inputs))


def _run_exactly(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    try:
        return _run(copy.deepcopy(model).double(), to_double(inputs))
    except RuntimeError:  # a model that builds its own fp32 constants does not run in fp64
        return _run(model, inputs)


def _zero_consumers(model: nn.Module, structure: Structure, keep: Keep) -> None:
    tensors = named_tensors(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for (name, dim), gone in removed_positions(structure, keep, shapes, "consume").items():
        where = torch.nonzero(gone).flatten().to(tensors[name].device)
        tensors[name].data = tensors[name].data.index_fill(dim, where, 0)


def _scramble(model: nn.Module, rng: np.random.Generator) -> None:
    """Give every floating parameter and norm statistic a random factor, and those that are constant random values."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    statistics = [t for n, t in model.named_buffers() if n.rsplit(".", 1)[-1] in ("running_mean", "running_var")]
    with torch.no_grad():
        for tensor in [*model.parameters(), *statistics]:
            if not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            factor = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
            if tensor.abs().max() == 0:
                factor = 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(factor.to(tensor))
            else:
                tensor.mul_(factor.to(tensor))


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
    with SoundGradients():
        output = flat_output(call_model(model, inputs))
    if not output.requires_grad:
        raise RunError("no gradient flows through the pruned model")
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(output.sum(), list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            raise RunError(f"the pruned model gives {name!r} a gradient that is not finite")
