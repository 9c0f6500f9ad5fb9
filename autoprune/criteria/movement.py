"""How far weights move from zero while fine-tuning (Sanh et al. 2020, Movement Pruning)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice

import torch
from torch import Tensor, nn

from autoprune.criteria._atoms import named_weights, summed_by_atom
from autoprune.criteria._gradients import backward, calibration, wide, working_copy
from autoprune.protocols import Batch, Task
from autoprune.structure import Group

NAME = "movement"


class Movement:
    """-sum of w * dL/dw over `steps` steps of SGD at `learning_rate`; of an atom the sum of what it owns.

    The fine-tuning goes in a copy of the model, in eval mode, over the batches of the calibration split in their order,
    again and again: the training split, which may shuffle, is no criterion's to read. All parameters learn. The scores
    are gathered on the dense weights; the paper masks by them as it goes.
    """

    def __init__(self, steps: int = 20, learning_rate: float = 0.01) -> None:
        if int(steps) != steps or steps < 1:
            raise ValueError(f"steps must be a whole number from 1 on, not {steps!r}")
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, not {learning_rate!r}")
        self._steps, self._rate = int(steps), learning_rate

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        return summed_by_atom(model, groups, lambda names: self.weights(model, names, task))

    def weights(self, model: nn.Module, names: Sequence[str], task: Task) -> Mapping[str, Tensor]:
        work = working_copy(model)
        weights = named_weights(work, names)
        scores = {name: torch.zeros_like(w, dtype=wide(w), requires_grad=False) for name, w in weights.items()}
        hint = f" after some steps at a learning_rate of {self._rate}; a lower one may keep it so"
        for _ in backward(NAME, work, task, self._batches(task), hint):
            with torch.no_grad():
                for name, weight in weights.items():
                    if weight.grad is not None:
                        scores[name] -= weight.to(wide(weight)) * weight.grad
                for parameter in work.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=self._rate)
        return {name: score.cpu() for name, score in scores.items()}

    def _batches(self, task: Task) -> Iterator[Batch]:
        passes = (calibration(NAME, task) for _ in range(self._steps))  # each has a batch or more
        return islice(chain.from_iterable(passes), self._steps)
