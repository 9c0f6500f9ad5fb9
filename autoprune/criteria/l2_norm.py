"""L2 norm of the weights that produce an atom (He et al. 2018, Soft Filter Pruning)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.criteria._atoms import atom_sums, named_weights, normalised_total
from autoprune.protocols import Task
from autoprune.structure import Group, Slice


class L2Norm:
    """Root of the sum of w^2 over the producing rows; tensors of one group are normalised by their mean, then added.

    Of a single weight w^2.
    """

    weights_only = True

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        return {g.name: normalised_total(model, g, _norms) for g in groups}

    @torch.no_grad()
    def weights(self, model: nn.Module, names: Sequence[str], task: Task) -> Mapping[str, Tensor]:
        return {name: weight.square().cpu() for name, weight in named_weights(model, names).items()}


def _norms(weight: Tensor, piece: Slice, width: int) -> Tensor:
    return atom_sums(weight.square(), piece, width).sqrt()
