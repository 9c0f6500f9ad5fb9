"""Lottery tickets: what is kept goes back to an early checkpoint, and is trained from there (Frankle et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from autoprune.protocols import Progress, Task
from autoprune.recovery._distilled import Distilled
from autoprune.recovery._early import Early


class Rewind:
    """`weights` is the early checkpoint of the dense model; `course` says how it is trained from there.

    The finished model tells which atoms and which weights are kept; they are those of the checkpoint, without a repair.
    """

    def __init__(self, weights: Path | None = None, course: Distilled | None = None) -> None:
        self._early, self.course = Early("rewind", weights), course or Distilled()

    def check(self, dense: nn.Module) -> None:
        """Read the checkpoint once, before any work.

        Raises:
            InputError: the file is damaged, or of another model than `dense`.
        """
        self._early.check(dense)

    def start(self, model: nn.Module) -> None:
        """Give a copy of the dense model the weights of the checkpoint, in place.

        Raises:
            InputError: the file is missing or of another model.
        """
        self._early.start(model)

    def __call__(self, model: nn.Module, dense: nn.Module, task: Task, steps: int, seed: int) -> Iterable[Progress]:
        """Train `model` in place, as one_shot does.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        return self.course.course(model, dense, task, steps, seed)
