"""Optimal brain surgeon over whole atoms: the error left after compensation (ZipLM, Kurtic et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.database.compensate import drop_atoms
from autoprune.database.consumers import Consumer, consumed, consumers_of
from autoprune.database.grams import collect_grams
from autoprune.protocols import Task
from autoprune.structure import Group
from autoprune.tracing.wiring import find_sites


class Obs:
    """The order in which the least compensated output error drops the atoms; the score is the place in it."""

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        sites = find_sites(model, task.example_inputs())
        readers = consumed(groups, sites)
        grams = collect_grams(model, {w for ws in readers.values() for w in ws}, task, task.split("calibration"))
        return {g.name: self.from_consumers(g, consumers_of(model, g, readers[g.name], sites, grams)) for g in groups}

    def from_consumers(self, group: Group, consumers: Sequence[Consumer]) -> Tensor:
        """Scores from Grams that the level database has collected."""
        scores = torch.full((group.width,), float(group.width))
        alive = set(range(group.width))
        for level in drop_atoms(consumers, group.width):
            gone = alive - set(level.kept.tolist())
            scores[list(gone)] = float(group.width - level.width)
            alive -= gone
        return scores
