"""Weights in 8 bits: signed integers with one scale an output, and what is left makes up for each rounding.

Compensated rounding is that of GPTQ (Frantar et al. 2022): one column after the other is rounded, and the columns that
are still free take up what that costs in the outputs. The factor R of the Gram gives it from the last column to the
first, each being rounded where the outputs would have it (Babai's nearest plane).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autoprune.database.consumers import Consumer
from autoprune.database.factors import Factored, Part, ridged
from autoprune.structure import Group
from autoprune.tracing.calls import from_matrix, kept_dim, to_matrix
from autoprune.tracing.rounding import LARGEST, Rounded, nearest, output_dim, scales_of

BLOCK = 64
"""Columns that are rounded before the rest of the matrix hears of it."""


def compensated(weight: Tensor, kind: str, factors: Sequence[tuple[Tensor, Tensor]]) -> Rounded:
    """The weight of an ungrouped layer of this `kind` rounded column by column.

    factors: (columns, R) with upper triangular R [n, n], R'R the Gram of those columns; columns are counted channel by
    channel, the taps of one side by side. Rows keep the largest number that they had, so that rounding once more gives
    the same integers.
    """
    matrix = to_matrix(weight, kind, 1)[0].transpose(1, 2)
    flat = matrix.flatten(1).float()
    scales = scales_of(flat)
    found = (flat / scales[:, None]).round().clamp(-LARGEST, LARGEST)
    top = flat.abs().argmax(1)
    for columns, factor in factors:
        fixed = columns.to(top.device)[None] == top[:, None]
        found[:, columns] = _walked(flat[:, columns] / scales[:, None], factor.to(flat), fixed)
    native = from_matrix(found.view(matrix.shape).transpose(1, 2)[None], kind, tuple(weight.shape[2:]))
    return Rounded(native.to(torch.int8).contiguous(), scales, kept_dim(kind))


def factors_at(reader: Factored, kept: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """What `compensated` wants of a whole matrix of which the `kept` channels (None: all) are left."""
    if kept is None:
        return [(_columns(part.atoms, _taps(part)), part.factor[0]) for part in reader.parts]
    found, start = [], 0
    for part in reader.parts:
        place = torch.isin(part.atoms, kept.cpu()).nonzero()[:, 0]
        if len(place):
            inner = part.factor[0][:, _columns(place, _taps(part)).to(part.factor.device)].double()
            factor = torch.linalg.cholesky(inner.T @ inner, upper=True)
            found.append((_columns(torch.arange(start, start + len(place)), _taps(part)), factor))
            start += len(place)
    return found


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


def _walked(target: Tensor, factor: Tensor, fixed: Tensor) -> Tensor:
    """Integers [rows, n] that are near `target` where the factor R measures: |R (target - found)| is small.

    Those that are `fixed`, bool [rows, n], are the nearest ones whatever the others are.
    """
    rest, n = torch.zeros_like(target), target.shape[1]
    found = torch.empty_like(target)
    scaled = factor / factor.diagonal()[:, None]
    for start in reversed(range(0, n, BLOCK)):
        stop = min(start + BLOCK, n)
        wanted = target[:, start:stop] + rest[:, stop:] @ scaled[start:stop, stop:].T
        for i in reversed(range(stop - start)):
            at = start + i
            value = wanted[:, i] + rest[:, at + 1 : stop] @ scaled[at, at + 1 : stop]
            value = torch.where(fixed[:, at], target[:, at], value)
            found[:, at] = value.round().clamp(-LARGEST, LARGEST)
            rest[:, at] = target[:, at] - found[:, at]
    return found


def _taps(part: Part) -> int:
    return part.factor.shape[1] // len(part.atoms)


def _columns(channels: Tensor, taps: int) -> Tensor:
    return (channels[:, None] * taps + torch.arange(taps)).flatten()
