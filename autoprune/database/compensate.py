"""Removal of atoms with compensation: one pass of drops yields the weights of every width (OBS; ZipLM, Kurtic 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.database.consumers import Consumer

RIDGE = 1e-3
"""Of the mean diagonal of the Gram (ALGORITHMS 2.2)."""


@dataclass(frozen=True)
class Level:
    """One width of a group: the kept atoms, ascending, and each consumer's compensated matrix (dropped columns 0).

    `dropped` went last, at the cost of `error`: the mean square it added to the consumers' outputs over their energy,
    summed over consumers (0 where the order was given).
    """

    width: int
    kept: Tensor
    matrices: tuple[Tensor, ...]
    dropped: int
    error: float


def drop_atoms(consumers: Sequence[Consumer], atoms: int, order: Sequence[int] | None = None) -> Iterator[Level]:
    """Drop one atom after the other, down to one; yields a Level for each width from atoms - 1 to 1.

    W <- W - W_a (H_aa)^-1 H_a:  and  H <- H - H_:a (H_aa)^-1 H_a:  with H = (G + ridge)^-1. Without an `order` (atoms,
    the first to go first) the next atom is the one of least error, summed over consumers: tr(W_a (H_aa)^-1 W_a').
    """
    states = [_State(c, atoms) for c in consumers]
    alive = torch.ones(atoms, dtype=torch.bool)
    for step in range(atoms - 1):
        error = 0.0
        if order is None:
            errors = torch.stack([s.errors() for s in states]).sum(0).cpu() if states else torch.zeros(atoms)
            a = int(errors.masked_fill(~alive, torch.inf).argmin())
            error = float(errors[a])
        else:
            a = int(order[step])
        for state in states:
            state.drop(a)
        alive[a] = False
        kept = alive.nonzero()[:, 0]
        yield Level(len(kept), kept, tuple(s.w for s in states), a, error)


class _State:
    """W and H of one consumer while atoms go; [conv groups, rows, n] and [conv groups, n, n]."""

    def __init__(self, consumer: Consumer, atoms: int) -> None:
        g = consumer.second
        ridge = RIDGE * g.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
        eye = torch.eye(g.shape[1], dtype=g.dtype, device=g.device)
        self.h = torch.linalg.inv(g + ridge[:, None, None] * eye)
        self.w = consumer.matrix.clone()
        self.share, self.atoms, self.block = consumer.share, atoms, consumer.block
        self.eye = torch.eye(self.block, dtype=g.dtype, device=g.device)
        self.gone = torch.zeros(atoms, dtype=torch.bool, device=g.device)

    def errors(self) -> Tensor:
        """Error of dropping each atom, [atoms]; those gone give 0 and are masked by the caller."""
        n, b = self.atoms, self.block
        index = torch.arange(n, device=self.h.device)
        blocks = self.h.unflatten(1, (n, b)).unflatten(3, (n, b))[:, index, :, index].transpose(0, 1)
        blocks = torch.where(self.gone[None, :, None, None], self.eye, blocks)
        w = self.w.unflatten(2, (n, b)) * self.share.sqrt()[:, :, None, None]
        errors: Tensor = (torch.einsum("grab,grac->gabc", w, w) * torch.linalg.inv(blocks)).sum((0, 2, 3))
        return errors

    def drop(self, a: int) -> None:
        s = slice(a * self.block, (a + 1) * self.block)
        gain = torch.linalg.solve(self.h[:, s, s], self.h[:, s, :])
        self.w = self.w - self.w[:, :, s] @ gain
        self.h = self.h - self.h[:, :, s] @ gain
        self.w[:, :, s] = 0.0  # exactly what the algebra gives up to rounding
        self.gone[a] = True
