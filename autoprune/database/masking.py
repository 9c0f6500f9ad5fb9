"""Which numbers of a weight stay, and what is left making up for the others.

By the Gram of the inputs that is SparseGPT (Frantar & Alistarh 2023): the mask of a block of columns is chosen by what
each number costs in the outputs once those behind it are settled, and every number that goes is made up for. By the
scores of another criterion the best stay as they are, and so do those of a pattern over more columns than one Gram has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.database.columns import Settle, walked
from autoprune.database.consumers import Consumer
from autoprune.database.factors import ridged
from autoprune.matrices import numbers_of
from autoprune.structure import Group
from autoprune.tracing.calls import from_matrix, to_matrix

BLOCK = 64
"""Columns whose mask is chosen at once, about; a pattern's blocks hold whole runs."""
STEPS = 8
"""Of conjugate gradients: what they leave of the error that a mask does not need."""
TINY = 1e-30


@dataclass(frozen=True)
class Zeros:
    """How many numbers of a weight stay: `kept` of `width` of the dense one, the share of whatever is left of it.

    With a `pattern` (n, m), n of every m input channels that lie side by side; a last run that is shorter keeps as many
    of its channels as it has, up to n.
    """

    kept: int
    width: int
    pattern: tuple[int, int] | None = None

    @staticmethod
    def of(group: Group, width: int) -> Zeros:
        """What a group of kind `weight` says at a width."""
        return Zeros(width, group.width, numbers_of(group.pattern) if group.pattern else None)

    def count(self, numbers: int) -> int:
        """How many of so many numbers stay."""
        return math.floor(self.kept * numbers / self.width + 0.5)


def best(scores: Tensor, zeros: Zeros, outputs: int = 0) -> Tensor:
    """The mask, bool like `scores` of a weight, of those that score most; dimension `outputs` counts its outputs.

    Of equal ones those that come first stay.
    """
    if zeros.pattern is None:
        return most(scores.flatten()[None], zeros.count(scores.numel())).view(scores.shape)
    channels = scores.movedim(1 - outputs, -1)
    return in_runs(channels.contiguous(), *zeros.pattern).movedim(-1, 1 - outputs)


def sparse(weight: Tensor, kind: str, factors: Sequence[tuple[Tensor, Tensor]], zeros: Zeros) -> tuple[Tensor, Tensor]:
    """The weight of an ungrouped layer of this `kind` with its zeros, and its mask, bool like it.

    factors: see `columns.factors_at`.
    """
    matrix = to_matrix(weight, kind, 1)[0].transpose(1, 2)
    flat = matrix.flatten(1).float()
    found, mask = flat.clone(), torch.ones_like(flat, dtype=torch.bool)
    for columns, factor in factors:
        target, r = flat[:, columns], factor.to(flat)
        walk = _Walk(r, zeros, matrix.shape[2], len(columns))
        start = walked(target, r, walk.choose, walk.block)
        mask[:, columns] = own = walk.mask(len(flat))
        found[:, columns] = within(own, start, target, r.T @ r)
    native = (from_matrix(x.view(matrix.shape).transpose(1, 2)[None], kind, weight.shape[2:]) for x in (found, mask))
    return next(native).to(weight.dtype).contiguous(), next(native).contiguous()


def within(mask: Tensor, start: Tensor, target: Tensor, second: Tensor) -> Tensor:
    """Of the weights [rows, n] that are zero outside `mask` those with the least (w - target) second (w - target)'.

    By STEPS of conjugate gradients from `start`, each row a system of its own, preconditioned by the diagonal of the
    Gram `second` [n, n].
    """
    found, scale = torch.where(mask, start, 0.0), second.diagonal().clamp_min(TINY).reciprocal()
    rest = torch.where(mask, (target - found) @ second, 0.0)
    step = rest * scale
    size = (rest * step).sum(1, keepdim=True)
    for _ in range(STEPS):
        changed = torch.where(mask, step @ second, 0.0)
        length = size / (step * changed).sum(1, keepdim=True).clamp_min(TINY)
        found, rest = found + length * step, rest - length * changed
        smaller = (rest * rest * scale).sum(1, keepdim=True)
        step = rest * scale + smaller / size.clamp_min(TINY) * step
        size = smaller
    return found


class _Walk:
    """The mask of one factor's columns, block by block from the last one."""

    def __init__(self, factor: Tensor, zeros: Zeros, taps: int, columns: int) -> None:
        self.factor, self._zeros, self._taps, self._columns = factor, zeros, taps, columns
        run = taps * (1 if zeros.pattern is None else zeros.pattern[1])
        self.block = run * max(1, BLOCK // run) if zeros.pattern is not None else BLOCK
        self._masks: list[Tensor] = []
        self._stayed = 0

    def choose(self, columns: slice, wanted: Tensor) -> Settle:
        cost = (wanted * self.factor.diagonal()[columns]).square()
        if self._zeros.pattern is not None:
            by_channel = cost.view(len(cost), -1, self._taps).transpose(1, 2).contiguous()
            mask = in_runs(by_channel, *self._zeros.pattern).transpose(1, 2).reshape(cost.shape)
        else:
            until = self._zeros.count(len(cost) * (self._columns - columns.start))
            mask = most(cost.flatten()[None], until - self._stayed).view(cost.shape)
            self._stayed = until
        self._masks.append(mask)

        def settle(at: int, value: Tensor) -> Tensor:
            return torch.where(mask[:, at - columns.start], value, 0.0)

        return settle

    def mask(self, rows: int) -> Tensor:
        """All columns [rows, n]."""
        return torch.cat([torch.ones(rows, 0, dtype=torch.bool), *reversed(self._masks)], 1)


def weight_scores(model: nn.Module, group: Group, consumers: Sequence[Consumer]) -> Tensor:
    """What each number of a weight costs once all others may make up for it, flat in its order, float32 [numbers].

    w^2 / [H^-1]_jj (OBS, Hassibi & Stork 1993), as a share of the energy of the layer's outputs; where its inputs are
    not known, the number's share in the squares of the weight.
    """
    (name,) = group.matrices
    weight = model.get_parameter(name).detach()
    found = weight.double().square() / weight.double().square().sum().clamp_min(1e-30)
    if consumers:
        reader = consumers[0].reader
        matrix = torch.zeros_like(reader.matrix(weight), dtype=torch.float64)
        for c in consumers:
            root = torch.linalg.cholesky(ridged(c.second), upper=True)
            inverse = torch.linalg.solve_triangular(root, torch.eye(root.shape[1]).to(root), upper=True)
            cost = c.matrix.square() / inverse.square().sum(2)[:, None] * c.share[:, :, None]
            columns = (c.atoms[:, None] * c.block + torch.arange(c.block)).flatten()
            matrix[:, :, columns.to(cost.device)] = cost
        found = reader.native(matrix, torch.arange(len(reader.positions)))
    return found.flatten().float().cpu()


def most(scores: Tensor, count: int) -> Tensor:
    """The `count` largest of each row [rows, n], bool; of equal ones the first."""
    least = scores.shape[1] - count
    if count <= 0 or least <= 0:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    edge = scores.kthvalue(least + 1, dim=1, keepdim=True).values  # no sort: numbers are many
    above, level = scores > edge, scores == edge
    return above | (level & (level.cumsum(1) <= count - above.sum(1, keepdim=True)))


def in_runs(scores: Tensor, n: int, m: int) -> Tensor:
    """The n largest of every m along the last dimension, bool."""
    length = scores.shape[-1]
    padded = nn.functional.pad(scores, (0, -length % m), value=-torch.inf).view(-1, m)
    return most(padded, n).view(*scores.shape[:-1], -1)[..., :length]
