"""The order in which atoms go: the one of least compensated error first (OBS over whole atoms; ZipLM, Kurtic 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autoprune.database.consumers import Consumer
from autoprune.database.factors import ridged, working_dtype

PENDING = 256
"""Columns whose removal waits: the inverse is then updated by one product of matrices, not atom by atom."""
WAITING = 64
"""Atoms that wait at most, so that gone columns soon cost nothing."""


def drop_order(consumers: Sequence[Consumer], atoms: int) -> tuple[list[int], list[float]]:
    """Atoms in the order in which they go, the last one excepted, and the error of each drop.

    With H = (G + ridge)^-1 the next atom is the one of least tr(W_a (H_aa)^-1 W_a'), each consumer's rows weighted by
    its `share`, summed over consumers; that is the mean square that it adds to their outputs over their energy. Then
    W <- W - W_a (H_aa)^-1 H_a:  and  H <- H - H_:a (H_aa)^-1 H_a: (ALGORITHMS 2).
    """
    states = [_Drops(c, atoms) for c in consumers]
    alive = torch.ones(atoms, dtype=torch.bool)
    order, lost = [], []
    for _ in range(atoms - 1):
        errors = sum((s.errors() for s in states), torch.zeros(atoms, dtype=torch.float64))
        a = int(errors.masked_fill(~alive, torch.inf).argmin())
        for state in states:
            state.drop(a)
        alive[a] = False
        order.append(a)
        lost.append(float(errors[a]))
    return order, lost


class _Drops:
    """H and W of one consumer while atoms go, [conv groups, n, n] and [conv groups, rows, n].

    Removals wait as the factors of H - left @ right and W - front @ right; only what the next choice needs is kept up
    to date: the diagonal blocks of H, and those of W'W, of which the error is made.
    """

    def __init__(self, consumer: Consumer, atoms: int) -> None:
        factor, failed = torch.linalg.cholesky_ex(ridged(consumer.second))
        factor[failed != 0] = torch.nan  # of inputs that are not finite: said of the scores
        self.dtype, self.block, self.atoms = working_dtype(factor), consumer.block, atoms
        self.h = torch.cholesky_inverse(factor).to(self.dtype)
        w = consumer.matrix * consumer.share.sqrt()[:, :, None]
        if w.shape[1] > w.shape[2]:
            w = torch.linalg.qr(w, mode="r").R  # the error sees W'W alone
        self.w = w.to(self.dtype)
        self.owned = consumer.atoms.clone()
        self._begin()

    def errors(self) -> Tensor:
        """Error of dropping each atom, float64 [atoms]; 0 for those that this consumer has not or no more."""
        self.inverse = torch.linalg.inv_ex(torch.where(self.gone[None, :, None, None], self.eye, self.diagonal)).inverse
        found = (self.inverse * self.energy).sum((0, 2, 3)).double()
        errors = torch.zeros(self.atoms, dtype=torch.float64)
        errors[self.owned] = found.masked_fill(self.gone, 0.0).cpu()
        return errors

    def drop(self, atom: int) -> None:
        """Remove an atom; it may be none of this consumer's."""
        found = (self.owned == atom).nonzero()
        if len(found) == 0:
            return
        i, k, p = int(found), self.block, self.pending
        columns, right = slice(i * k, (i + 1) * k), self.right[:, :p]
        h = self.h[:, columns] - self.left[:, columns, :p] @ right
        w = self.w[:, :, columns] - self.front[:, :, :p] @ right[:, :, columns]
        gain = self.inverse[:, i] @ h
        seen = w.mT @ self.w - (w.mT @ self.front[:, :, :p]) @ right
        ours, theirs, both = (self._blocks(t) for t in (h, gain, seen))
        self.diagonal -= ours.mT @ theirs
        cross = both.mT @ theirs
        self.energy -= cross + cross.mT - theirs.mT @ (w.mT @ w)[:, None] @ theirs
        self.left[:, :, p : p + k], self.right[:, p : p + k], self.front[:, :, p : p + k] = h.mT, gain, w
        self.gone[i] = True
        self.pending += k
        if self.pending == self.right.shape[1]:
            self._flush()

    def _blocks(self, rows: Tensor) -> Tensor:
        """[conv groups, block, n] as [conv groups, atoms, block, block]."""
        blocks: Tensor = rows.unflatten(2, (-1, self.block)).transpose(1, 2)
        return blocks

    def _begin(self) -> None:
        """Nothing waits; diagonal blocks are read off."""
        (g, n, _), rows, k = self.h.shape, self.w.shape[1], self.block
        m, waiting = n // k, k * max(1, min(WAITING, PENDING // k))
        new, self.pending = self.h.new_empty, 0
        self.left, self.right, self.front = new(g, n, waiting), new(g, waiting, n), new(g, rows, waiting)
        self.eye = torch.eye(k, dtype=self.dtype, device=self.h.device)
        self.gone = torch.zeros(m, dtype=torch.bool, device=self.h.device)
        index = torch.arange(m, device=self.h.device)
        self.diagonal = self.h.unflatten(1, (m, k)).unflatten(3, (m, k))[:, index, :, index].transpose(0, 1).clone()
        w = self.w.unflatten(2, (m, k)).permute(0, 2, 1, 3)
        self.energy = w.mT @ w

    def _flush(self) -> None:
        """Do what waits, and let go of the columns that are gone."""
        self.h.baddbmm_(self.left, self.right, alpha=-1)
        self.w.baddbmm_(self.front, self.right, alpha=-1)
        live = (~self.gone).nonzero()[:, 0]
        columns = (live[:, None] * self.block + torch.arange(self.block, device=live.device)).flatten()
        self.h, self.w = self.h[:, columns][:, :, columns].contiguous(), self.w[:, :, columns].contiguous()
        self.owned = self.owned[live.cpu()]
        self._begin()
