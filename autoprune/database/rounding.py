"""Weights in 8 bits: signed integers with one scale an output, and what is left makes up for each rounding.

Compensated rounding is that of GPTQ (Frantar et al. 2022): one column after the other is rounded, and the columns that
are still free take up what that costs in the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from autoprune.database.columns import always, walked
from autoprune.database.consumers import Consumer
from autoprune.database.factors import ridged
from autoprune.structure import Group
from autoprune.tracing.calls import from_matrix, kept_dim, to_matrix
from autoprune.tracing.rounding import LARGEST, Rounded, nearest, output_dim, scales_of

BLOCK = 64
"""Columns that are rounded before the rest of the matrix hears of it."""


def compensated(weight: Tensor, kind: str, factors: Sequence[tuple[Tensor, Tensor]], zeros: bool = False) -> Rounded:
    """The weight of an ungrouped layer of this `kind` rounded column by column.

    factors: see `columns.factors_at`. Rows keep the largest number that they had, so that rounding once more gives the
    same integers; with `zeros` those stay as well.
    """
    matrix = to_matrix(weight, kind, 1)[0].transpose(1, 2)
    flat = matrix.flatten(1).float()
    scales = scales_of(flat)
    found = (flat / scales[:, None]).round().clamp(-LARGEST, LARGEST)
    top = flat.abs().argmax(1)
    for columns, factor in factors:
        target = flat[:, columns] / scales[:, None]
        fixed = columns.to(top.device)[None] == top[:, None]
        settle = partial(_rounded, target, fixed | (target == 0) if zeros else fixed)
        found[:, columns] = walked(target, factor.to(flat), always(settle), BLOCK)
    native = from_matrix(found.view(matrix.shape).transpose(1, 2)[None], kind, tuple(weight.shape[2:]))
    return Rounded(native.to(torch.int8).contiguous(), scales, kept_dim(kind))


def _rounded(target: Tensor, fixed: Tensor, at: int, value: Tensor) -> Tensor:
    """The integers of a column; those that are `fixed`, bool [rows, n], are the nearest ones whatever others are."""
    return torch.where(fixed[:, at], target[:, at], value).round().clamp(-LARGEST, LARGEST)


def by_channel(second: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """A factor for `compensated` from the Gram [n, n] of columns that are counted tap by tap."""
    n = second.shape[0]
    order = torch.arange(n).view(taps, -1).T.flatten()
    factor = torch.linalg.cholesky(ridged(second[order][:, order][None])[0], upper=True)
    return torch.arange(n), factor


def rounding_scores(model: nn.Module, group: Group, consumers: Sequence[Consumer]) -> Tensor:
    """What 8 bits cost a precision, for each of its bits alike: the share of its outputs' energy, float64 [bits].

    The mean over its matrices; of one whose inputs are not known it is the share of the weight's own squares.
    """
    lost, seen = 0.0, {c.reader.weight for c in consumers}
    for c in consumers:
        error = c.matrix - nearest(c.matrix.flatten(0, 1)).weight.view(c.matrix.shape)
        lost += float((c.share * ((error @ c.second) * error).sum(2)).sum())
    for name in (name for name in group.matrices if name not in seen):
        weight = model.get_parameter(name).detach().double()
        error = weight - nearest(weight, output_dim(model.get_submodule(name.rpartition(".")[0]))).weight
        lost += float(error.square().sum() / weight.square().sum().clamp_min(1e-30))
    return torch.full((group.width,), lost / len(group.matrices), dtype=torch.float64)
