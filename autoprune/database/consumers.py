"""The weights that read a group, in matrix form with the group's own columns: what compensation works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.database.grams import Gram
from autoprune.database.zeros import patterned
from autoprune.structure import Group
from autoprune.tracing.calls import from_matrix, to_matrix
from autoprune.tracing.wiring import Site, batch_norms


@dataclass(frozen=True)
class Consumer:
    """One weight restricted to the columns of one group.

    matrix: float64 [conv groups, rows, atoms * block], the block of an atom side by side (its positions, then taps);
    second: the Gram of those columns; mean: [conv groups, atoms * block]; share: [conv groups, rows], the weight of
    each output row in the error, already divided by the output energy; positions: [atoms, positions of an atom];
    patterned: its zeros stay, so that it is not compensated.
    """

    weight: str
    site: Site
    kernel: tuple[int, ...]
    dim: int
    matrix: Tensor
    second: Tensor
    mean: Tensor
    share: Tensor
    positions: Tensor
    patterned: bool = False

    @property
    def block(self) -> int:
        """Columns of one atom."""
        return self.matrix.shape[2] // len(self.positions)

    def without(self, kept: Tensor) -> Tensor:
        """`matrix` with the columns of all atoms but the kept ones zero."""
        alive = torch.zeros(len(self.positions), dtype=torch.bool, device=self.matrix.device)
        alive[kept] = True
        return self.matrix * alive.repeat_interleave(self.block)

    def native(self, matrix: Tensor, kept: Tensor) -> Tensor:
        """Columns of the kept atoms of `matrix` as a weight, restricted to their positions in ascending order."""
        groups, count, _ = matrix.shape
        taps = self.block // self.positions.shape[1]
        w = matrix.unflatten(2, (len(self.positions), self.positions.shape[1], taps))[:, :, kept].flatten(2, 3)
        w = w[:, :, self.positions[kept].flatten().argsort()]
        return from_matrix(w.transpose(2, 3).reshape(groups, count, taps, -1), self.site.kind, self.kernel)


def consumed(groups: Sequence[Group], sites: Mapping[str, Site]) -> dict[str, list[str]]:
    """For every group the conv and linear weights that read it."""
    return {g.name: sorted({s.tensor for s in g.slices if s.role == "consume" and s.tensor in sites}) for g in groups}


def consumers_of(
    model: nn.Module, group: Group, names: Sequence[str], sites: Mapping[str, Site], grams: Mapping[str, Gram]
) -> list[Consumer]:
    """The consumers called `names` of `group` with the Gram blocks of its columns (ALGORITHMS 2.3)."""
    weights, norms = dict(model.named_parameters()), batch_norms(model)
    found = []
    for name in names:
        site, weight, gram = sites[name], weights[name].detach(), grams[name]
        slices = [s for s in group.slices if s.tensor == name and s.role == "consume"]
        per_group = weight.shape[slices[0].dim] // (site.groups if site.kind == "transposed" else 1)
        owned = [sorted({p % per_group for s in slices for p in s.positions(a)}) for a in range(group.width)]
        positions = torch.tensor(owned)
        matrix = to_matrix(weight, site.kind, site.groups).double()
        taps, channels = matrix.shape[2:]
        columns = (torch.arange(taps) * channels + positions[:, :, None]).flatten().to(weight.device)
        share = torch.ones(matrix.shape[0] * matrix.shape[1], dtype=torch.float64, device=weight.device)
        if site.norm is not None:
            bn = norms[site.norm]
            assert bn.running_var is not None
            scale = bn.weight.detach() if bn.weight is not None else 1.0
            share = (scale * (bn.running_var + bn.eps).rsqrt()).double().square()
        share = share / (share * gram.energy).sum().clamp_min(1e-30)
        second = gram.second[:, columns][:, :, columns]
        found.append(
            Consumer(
                name,
                site,
                tuple(weight.shape[2:]),
                slices[0].dim,
                matrix.flatten(2)[:, :, columns],
                second,
                gram.mean[:, columns],
                share.view(matrix.shape[0], -1),
                positions,
                patterned(weight),
            )
        )
    return found
