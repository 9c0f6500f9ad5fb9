"""Weights that 8 bits hold: signed integers with one scale an output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.structure import Group

LARGEST = 127
"""The largest integer; -128 is left out, so that scales are symmetric."""
MATRIX = 2
"""Dimensions of a weight that is a matrix, at least."""
SPARE = 0xFF
"""The last 8 of 24 binary digits."""


@dataclass(frozen=True)
class Rounded:
    """Integers [as the weight], int8, and their scales, float32 [outputs], which lie along dimension `dim`."""

    integers: Tensor
    scales: Tensor
    dim: int

    @property
    def weight(self) -> Tensor:
        """Float32, the very numbers that the integers stand for."""
        return self.integers.float() * along(self.scales, self.integers, self.dim)


def nearest(weight: Tensor, dim: int = 0) -> Rounded:
    """Each number to the nearest one; a row of zeros has the scale 1."""
    scales = scales_of(weight.movedim(dim, 0).flatten(1))
    return Rounded((weight / along(scales, weight, dim)).round().clamp(-LARGEST, LARGEST).to(torch.int8), scales, dim)


def output_dim(layer: nn.Module) -> int:
    """The dimension of a layer's weight that counts its outputs: 1 of transposed convolutions and GPT-2's Conv1D."""
    sideways = any(k.__name__ == "Conv1D" and k.__module__.startswith("transformers.") for k in type(layer).__mro__)
    return 1 if sideways or isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0


def is_rounded(weight: Tensor, dim: int = 0, tolerance: float = 0.0) -> bool:
    """Whether a weight holds numbers that were rounded to 8 bits, one of them between 0 and the largest.

    Rows of one number, or of one number and zeros, are what 8 bits hold as well, whoever made them.
    """
    if not weight.is_floating_point() or weight.dim() < MATRIX:
        return False
    found = nearest(weight, dim)
    sizes = found.integers.abs()
    between = bool(((sizes > 0) & (sizes < LARGEST)).any())
    return between and torch.allclose(found.weight, weight.float(), rtol=tolerance, atol=0.0)


def along(scales: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Scales [outputs] in a shape that broadcasts over a weight, whose dimension `dim` counts its outputs."""
    shape = [1] * weight.dim()
    shape[dim] = -1
    return scales.view(shape)


def scales_of(rows: Tensor) -> Tensor:
    """One for each of `rows` [outputs, n]: its largest number becomes 127. Rounded up to 16 binary digits.

    With so few, 127 scales and whatever lies below are exact in float32: numbers that were rounded are so once more
    without any change, here and by every quantiser.
    """
    most = rows.abs().amax(1).float()
    exact = torch.where(most > 0, most / LARGEST, 1.0).contiguous()
    return ((exact.view(torch.int32) + SPARE) & ~SPARE).view(torch.float32)


@dataclass(frozen=True)
class Narrow:
    """A weight that a policy stores in 8 bits, and the dimension along which its scales lie."""

    name: str
    parameter: nn.Parameter
    dim: int


def narrow_weights(model: nn.Module, groups: Iterable[Group], widths: Mapping[str, int]) -> Iterator[Narrow]:
    """The weights of `model` for which `widths` say fewer bits than the dense ones have; absent ones have none."""
    held = dict(model.named_parameters())
    for name in (n for g in groups if g.kind == "bits" and widths[g.name] < g.width for n in g.matrices):
        if name in held:
            yield Narrow(name, held[name], output_dim(model.get_submodule(name.rpartition(".")[0])))


def round_weights(model: nn.Module, groups: Iterable[Group], widths: Mapping[str, int]) -> None:
    """Make every weight what its bits can hold, in place; one that is so already does not change."""
    for weight in narrow_weights(model, groups, widths):
        weight.parameter.data = nearest(weight.parameter.detach(), weight.dim).weight.to(weight.parameter)
