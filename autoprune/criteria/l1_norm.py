"""L1 norm of the weights that produce an atom (Li et al. 2017, Pruning Filters for Efficient ConvNets)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.criteria._atoms import atom_sums, normalised, produced_weights
from autoprune.protocols import Task
from autoprune.structure import Group


class L1Norm:
    """Sum of |w| over the producing rows; tensors of one group are normalised by their mean, then added."""

    weights_only = True

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        return {g.name: self._score(model, g) for g in groups}

    def _score(self, model: nn.Module, group: Group) -> Tensor:
        parts = [normalised(atom_sums(w.abs(), s, group.width)) for s, w in produced_weights(model, group)]
        return sum(parts, torch.zeros(group.width, dtype=torch.float64))
