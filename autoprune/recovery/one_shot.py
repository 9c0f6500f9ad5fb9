"""One course to the end: distillation from the dense model, a warm-up, then a cosine (ALGORITHMS 8)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from autoprune.protocols import Progress, Task
from autoprune.recovery._distilled import Distilled


class OneShot:
    """By default SGD with Nesterov momentum where there are batch norms, else AdamW; `course` says all of it."""

    def __init__(self, course: Distilled | None = None) -> None:
        self.course = course or Distilled()

    def __call__(self, model: nn.Module, dense: nn.Module, task: Task, steps: int, seed: int) -> Iterable[Progress]:
        """Train `model` in place, a word after every step.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        return self.course.course(model, dense, task, steps, seed)
