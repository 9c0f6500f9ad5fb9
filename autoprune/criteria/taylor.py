"""First-order Taylor expansion of the loss (Molchanov et al. 2019, Importance Estimation for Pruning)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.criteria._atoms import atom_sums, produced_weights
from autoprune.errors import InputError
from autoprune.protocols import Task
from autoprune.structure import Group
from autoprune.tracing.copies import copied
from autoprune.tracing.sound_gradients import SoundGradients


class Taylor:
    """Mean over batches of (sum of w * dL/dw over the producing rows)^2, on the task's own loss."""

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        work = copied(model).eval().requires_grad_(True)
        scores = {g.name: torch.zeros(g.width, dtype=torch.float64) for g in groups}
        batches = list(task.split("calibration"))
        for batch in batches:
            with torch.enable_grad(), SoundGradients():
                work.zero_grad(set_to_none=True)
                loss = task.loss(work, batch)
                if not bool(torch.isfinite(loss)):
                    raise InputError("criterion 'taylor': the task's loss is not finite on the calibration data")
                loss.backward()
            for group in groups:
                scores[group.name] += self._first_order(work, group).square() / len(batches)
        return scores

    def _first_order(self, model: nn.Module, group: Group) -> Tensor:
        total = torch.zeros(group.width, dtype=torch.float64)
        for piece, weight in produced_weights(model, group):
            if weight.grad is not None:
                total += atom_sums(weight * weight.grad, piece, group.width)
        return total
