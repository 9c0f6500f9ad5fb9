"""A course of distillation from the dense model: what all recoveries end with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from autoprune.database.drawn import draw
from autoprune.database.zeros import patterned_weights
from autoprune.errors import InputError
from autoprune.evaluator.fidelity import AUTO, fidelity_for
from autoprune.evaluator.finetune import Course, Lesson, Recipe
from autoprune.evaluator.material import material_for
from autoprune.evaluator.prepared import LOOKED_AT, fast_format
from autoprune.protocols import Progress, Task
from autoprune.tracing.one_thread import one_thread
from autoprune.tracing.outputs import faithful
from autoprune.tracing.wiring import find_sites

AT_ONCE = 256
"""Samples that the dense model sees at a time."""


@dataclass(frozen=True)
class Distilled:
    """The course that a recovery's options describe.

    `learning_rate` is the peak (None: the optimizer's usual one), `distillation` its share of the loss, the task's own
    loss has the rest; `loss` is the one between outputs, a file of autoprune/losses.

    Raises:
        InputError: an option is out of its range.
    """

    learning_rate: float | None = None
    distillation: float = 1.0
    loss: str = AUTO

    def __post_init__(self) -> None:
        if self.learning_rate is not None and not 0.0 < self.learning_rate <= 10.0:
            raise InputError(f"recovery.options: learning_rate must lie in (0, 10], not {self.learning_rate}")
        if not 0.0 <= self.distillation <= 1.0:
            raise InputError(f"recovery.options: distillation must lie in [0, 1], not {self.distillation}")

    def course(
        self,
        model: nn.Module,
        dense: nn.Module,
        task: Task,
        steps: int,
        seed: int,
        after_step: Callable[[float], None] | None = None,
    ) -> Iterator[Progress]:
        """Train `model` in place, a word after every step; `after_step` is told the learning rate of each.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        lesson, recipe = _lesson(dense, task, steps, seed, self.loss), Recipe(self.learning_rate, self.distillation)
        course = Course(model, lesson, steps, seed, recipe=recipe, after_step=after_step)
        return course.run(range(1, steps + 1))


@one_thread()
def _lesson(dense: nn.Module, task: Task, steps: int, seed: int, loss: str) -> Lesson:
    """What a course of `steps` learns from."""
    device = next((p.device for p in dense.parameters()), torch.device("cpu"))
    layout = fast_format(task, dense)
    samples = draw(task.split("train"), LOOKED_AT).on(device, layout)
    measure = fidelity_for(task, dense, samples[0], loss)
    sites = find_sites(dense, task.example_inputs())
    material = material_for(task, dense, steps, seed, layout, at_once=AT_ONCE)
    keep = patterned_weights(dense)
    return Lesson(material, partial(faithful, task), measure, sites, task_loss=task.loss, patterned=keep)
