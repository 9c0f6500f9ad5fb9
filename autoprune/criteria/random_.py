"""Random scores: the floor that every other criterion has to beat."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.criteria._atoms import named_weights
from autoprune.protocols import Task
from autoprune.structure import Group


class Random:
    """Uniform scores, seeded by `seed` and the name of the group, or of the weight."""

    weights_only = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        return {g.name: torch.rand(g.width, generator=self._generator(g.name)) for g in groups}

    def weights(self, model: nn.Module, names: Sequence[str], task: Task) -> Mapping[str, Tensor]:
        shapes = {name: weight.shape for name, weight in named_weights(model, names).items()}
        return {name: torch.rand(shape, generator=self._generator(name)) for name, shape in shapes.items()}

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(name.encode(), self.seed))  # of a seed it takes 32 bits only
