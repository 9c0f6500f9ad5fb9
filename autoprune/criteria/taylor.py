"""First-order Taylor expansion of the loss (Molchanov et al. 2019, Importance Estimation for Pruning)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.criteria._atoms import atom_sums, produced_weights
from autoprune.criteria._gradients import backward, calibration, means, working_copy
from autoprune.protocols import Task
from autoprune.structure import Group

NAME = "taylor"


class Taylor:
    """Mean over batches of (sum of w * dL/dw over the producing rows)^2, on the task's own loss.

    Of a single weight the mean over batches of |w * dL/dw|.
    """

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        work, batches = working_copy(model), 0
        totals = {g.name: torch.zeros(g.width, dtype=torch.float64) for g in groups}
        for _ in backward(NAME, work, task, calibration(NAME, task)):
            batches += 1
            for group in groups:
                totals[group.name] += self._first_order(work, group).square()
        return {name: total / batches for name, total in totals.items()}

    def weights(self, model: nn.Module, names: Sequence[str], task: Task) -> Mapping[str, Tensor]:
        return means(NAME, working_copy(model), names, task, lambda w, slope: (w * slope).abs())

    def _first_order(self, model: nn.Module, group: Group) -> Tensor:
        total = torch.zeros(group.width, dtype=torch.float64)
        for piece, weight in produced_weights(model, group):
            if weight.grad is not None:
                total += atom_sums(weight * weight.grad, piece, group.width)
        return total
