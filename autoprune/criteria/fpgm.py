"""Distance from the geometric median (He et al. 2019, Filter Pruning via Geometric Median)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.criteria._atoms import normalised_total
from autoprune.protocols import Task
from autoprune.structure import Group, Slice


class Fpgm:
    """Sum of the distances of an atom's producing weights from those of all others of its group.

    What is least lies nearest to the geometric median, so that the others can stand in for it. Tensors of one group are
    normalised by their mean, then added. A single weight is no point among others: there are no scores of weights.
    """

    weights_only = True

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        return {g.name: normalised_total(model, g, _distances) for g in groups}


def _distances(weight: Tensor, piece: Slice, width: int) -> Tensor:
    """For each atom the distances from all others that the slice holds, added up; 0 of those that it does not hold."""
    rows = weight.detach().cpu().double().movedim(piece.dim, 0).flatten(1)
    held = [atom for atom in range(width) if piece.positions(atom)]
    points = torch.stack([rows[list(piece.positions(atom))].flatten() for atom in held])
    total = torch.zeros(width, dtype=torch.float64)
    total[held] = torch.cdist(points, points).sum(1)
    return total
