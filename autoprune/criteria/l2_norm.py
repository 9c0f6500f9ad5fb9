"""L2 norm of the weights that produce an atom (He et al. 2018, Soft Filter Pruning)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.criteria._atoms import atom_sums, normalised, produced_weights
from autoprune.protocols import Task
from autoprune.structure import Group


class L2Norm:
    """Root of the sum of w^2 over the producing rows; tensors of one group are normalised by their mean, then added."""

    weights_only = True

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        return {g.name: self._score(model, g) for g in groups}

    def _score(self, model: nn.Module, group: Group) -> Tensor:
        parts = [normalised(atom_sums(w.square(), s, group.width).sqrt()) for s, w in produced_weights(model, group)]
        return sum(parts, torch.zeros(group.width, dtype=torch.float64))
