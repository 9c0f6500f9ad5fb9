"""One triangular factor for each consumer gives its compensated weights at every width (ALGORITHMS 2a)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.database.consumers import Consumer, Reader

RIDGE = 1e-3
"""Of the mean diagonal of the Gram (ALGORITHMS 2.2)."""
SMALL = 1024
"""Columns up to which float64 costs nothing that matters."""
CONDITION = 1e6
"""Of a Gram, estimated from its factor's diagonal, above which float32 would show."""


@dataclass(frozen=True)
class Part:
    """Some atoms of a consumer, the one kept longest first, and what makes up for those that go.

    factor: upper triangular R with R'R = Gram + ridge of their columns in that order, [conv groups, n, n]; mean: that
    of the inputs, [conv groups, n].
    """

    atoms: Tensor
    factor: Tensor
    mean: Tensor

    @property
    def ill_conditioned(self) -> bool:
        """Whether float32 was too little for a factor of this size."""
        return self.factor.shape[1] > SMALL and self.factor.dtype == torch.float64

    @staticmethod
    def of(consumer: Consumer, order: Sequence[int]) -> Part:
        """`order`: all atoms of the group, the one kept longest first."""
        place = {int(a): i for i, a in enumerate(consumer.atoms)}
        own = torch.tensor([place[a] for a in order if a in place], dtype=torch.long)
        columns = _columns(own, consumer.block).to(consumer.second.device)
        gram = consumer.second[:, columns][:, :, columns]
        factor = torch.linalg.cholesky(ridged(gram), upper=True)
        return Part(consumer.atoms[own], factor.to(working_dtype(factor)), consumer.mean[:, columns])

    def fill(self, matrix: Tensor, kept: int, patterned: bool = False) -> Tensor:
        """Make up in `matrix` [conv groups, rows, atoms * block] for all atoms but the first `kept`; the mean shift.

        In place, W_k + (W_d R_kd') R_kk^-T; a `patterned` one stays as it is. The shift [conv groups * rows], float64,
        is what the outputs lose on average.
        """
        block = self.factor.shape[1] // len(self.atoms)
        columns, n = _columns(self.atoms, block).to(matrix.device), kept * block
        w, mean = matrix[:, :, columns].to(self.factor.dtype), self.mean.to(matrix.device)
        lost = w[:, :, n:].double() @ mean[:, n:, None]
        if not patterned and n:
            r = self.factor.to(matrix.device)
            gain = w[:, :, n:] @ r[:, :n, n:].mT
            gain = torch.linalg.solve_triangular(r[:, :n, :n].mT, gain, upper=False, left=False)
            matrix.index_copy_(2, columns[:n], (w[:, :, :n] + gain).to(matrix.dtype))
            lost = lost - gain.double() @ mean[:, :n, None]
        return lost.flatten()


@dataclass(frozen=True)
class Factored:
    """A consumer's weights at every width of its group."""

    reader: Reader
    parts: tuple[Part, ...]

    def level(self, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """The dense `weight` compensated for all atoms but `kept`, restricted to them, and what its bias gains."""
        matrix, alive = self.reader.matrix(weight).clone(), set(kept.tolist())
        shifts = [p.fill(matrix, sum(a in alive for a in p.atoms.tolist()), self.reader.patterned) for p in self.parts]
        shift = torch.stack(shifts).sum(0).to(weight.dtype) if self.reader.bias is not None else None
        return self.reader.native(matrix, kept), shift


def ridged(second: Tensor) -> Tensor:
    """A Gram [conv groups, n, n] with its ridge, float64."""
    second = second.double()
    ridge = RIDGE * second.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    return second + ridge[:, None, None] * torch.eye(second.shape[1], dtype=second.dtype, device=second.device)


def working_dtype(factor: Tensor) -> torch.dtype:
    """The type to compute in with a Gram of this triangular factor, [conv groups, n, n]."""
    diagonal = factor.diagonal(dim1=1, dim2=2)
    condition = float((diagonal.amax(1) / diagonal.amin(1)).square().max())
    return torch.float32 if factor.shape[1] > SMALL and condition <= CONDITION else torch.float64


def _columns(atoms: Tensor, block: int) -> Tensor:
    """The columns of `atoms`, those of one side by side."""
    return (atoms[:, None] * block + torch.arange(block, device=atoms.device)).flatten()
