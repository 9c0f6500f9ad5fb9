"""Scale of the batch norm behind an atom (Liu et al. 2017, Network Slimming)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.criteria._atoms import atom_sums, carried_vectors, normalised
from autoprune.errors import InputError
from autoprune.protocols import Task
from autoprune.structure import Group
from autoprune.tracing.wiring import batch_norms


class BnScale:
    """|gamma| of the batch norms that carry the atom, normalised and added.

    Raises:
        InputError: a group has no batch norm with a scale.
    """

    weights_only = True

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        scales = {f"{name}.weight" for name in batch_norms(model)}
        return {g.name: self._score(model, g, scales) for g in groups if g.narrows}

    def _score(self, model: nn.Module, group: Group, scales: set[str]) -> Tensor:
        found = [(s, t) for s, t in carried_vectors(model, group) if s.tensor in scales]
        if not found:
            raise InputError(
                f"criterion 'bn_scale': no batch norm follows group {group.name!r}; use another criterion (obs, "
                f"l1_norm) or exclude the group with space.exclude"
            )
        parts = [normalised(atom_sums(t.abs(), s, group.width)) for s, t in found]
        return sum(parts, torch.zeros(group.width, dtype=torch.float64))
