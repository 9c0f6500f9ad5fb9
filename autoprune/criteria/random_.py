"""Random scores: the floor that every other criterion has to beat."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.protocols import Task
from autoprune.structure import Group


class Random:
    """Uniform scores, seeded by `seed` and the group's name."""

    weights_only = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        return {g.name: torch.rand(g.width, generator=self._generator(g.name)) for g in groups}

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed << 32) + zlib.crc32(name.encode()))
