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

RISE, TINY = 1.0 + 1e-9, 1e-30
"""What keeps the scores of equal errors in the order of the drops."""


class Obs:
    """Atoms go in the order of least compensated error; the score is that error, over the consumers' output energy.

    An atom never scores below one that went before it, so that the scores repeat the order.
    """

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        sites = find_sites(model, task.example_inputs())
        readers = consumed(groups, sites)
        grams = collect_grams(model, {w for ws in readers.values() for w in ws}, task, task.split("calibration"))
        return {g.name: self.from_consumers(g, consumers_of(model, g, readers[g.name], sites, grams)) for g in groups}

    def from_consumers(self, group: Group, consumers: Sequence[Consumer]) -> Tensor:
        """Scores from Grams that the level database has collected."""
        scores, last = torch.zeros(group.width, dtype=torch.float64), 0.0
        alive = set(range(group.width))
        for level in drop_atoms(consumers, group.width):
            last = scores[level.dropped] = max(level.error, last * RISE)
            alive.remove(level.dropped)
        scores[list(alive)] = last * RISE + TINY
        return scores
