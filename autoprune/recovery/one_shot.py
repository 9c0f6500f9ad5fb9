"""One course to the end: distillation from the dense model, a warm-up, then a cosine (ALGORITHMS 8)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from autoprune.evaluator.fidelity import AUTO
from autoprune.protocols import Progress, Task
from autoprune.recovery._distilled import Distilled


class OneShot:
    """SGD with Nesterov momentum where there are batch norms, else AdamW, as `evaluator.finetune.Course` does.

    `learning_rate` is the peak (None: the optimizer's usual one), `distillation` its share of the loss, the task's own
    loss has the rest; `loss` is the one between outputs, a file of autoprune/losses.
    """

    def __init__(self, learning_rate: float | None = None, distillation: float = 1.0, loss: str = AUTO) -> None:
        self._distilled = Distilled(learning_rate, distillation, loss)

    def __call__(self, model: nn.Module, dense: nn.Module, task: Task, steps: int, seed: int) -> Iterator[Progress]:
        """Train `model` in place, a word after every step.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        return self._distilled.course(model, dense, task, steps, seed)
