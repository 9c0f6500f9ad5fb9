"""Optimal brain surgeon over whole atoms: the error left after compensation (ZipLM, Kurtic et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.database.build import consumers_by_group
from autoprune.database.consumers import Consumer
from autoprune.database.drops import drop_order
from autoprune.protocols import Task
from autoprune.structure import Group

RISE, TINY = 1.0 + 1e-9, 1e-30
"""What keeps the scores of equal errors in the order of the drops."""


class Obs:
    """Atoms go in the order of least compensated error; the score is that error, over the consumers' output energy.

    An atom never scores below one that went before it, so that the scores repeat the order.
    """

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        found = consumers_by_group(model, groups, task, task.split("calibration"))
        return {group.name: self.from_consumers(group, consumers) for group, consumers in found}

    def from_consumers(self, group: Group, consumers: Sequence[Consumer]) -> Tensor:
        """Scores from Grams that the level database has collected."""
        scores, last = torch.zeros(group.width, dtype=torch.float64), 0.0
        order, errors = drop_order(consumers, group.width)
        for atom, error in zip(order, errors, strict=True):
            last = scores[atom] = max(error, last * RISE)
        scores[list(set(range(group.width)) - set(order))] = last * RISE + TINY
        return scores
