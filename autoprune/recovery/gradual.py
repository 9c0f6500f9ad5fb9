"""Zeros spread by a cubic while the model trains (Zhu & Gupta 2017, To Prune, or Not to Prune)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

from torch import nn

from autoprune.evaluator.finetune import Masks
from autoprune.policy import Policy
from autoprune.protocols import Progress, Task
from autoprune.recovery._distilled import Distilled
from autoprune.recovery._masking import MaskedCourse, Target, check_pace, targets_of, unmasked, with_zeros
from autoprune.structure import Structure


class Gradual:
    """From all weights to as many of each matrix as the point keeps; the smallest go, at every `every`-th step.

    With the share p of the first `until` of the steps over, a matrix still has (1 - p)^3 of the weights that it shall
    lose; weights that went stay zero. Which ones are kept the magnitudes on the way say, the masks of the point only
    how many. Batch norms gather anew (norm_statistics: running), as no repair knows the models on the way.
    """

    def __init__(self, every: int = 10, until: float = 0.75, course: Distilled | None = None) -> None:
        check_pace(every, until)
        self._every, self._until = every, until
        self.course = replace(course or Distilled(), norm_statistics="running")

    def check_policy(self, structure: Structure, policy: Policy) -> None:
        """InputError where the policy leaves no zeros in any weight."""
        with_zeros(structure, policy, "gradual")

    def __call__(self, model: nn.Module, dense: nn.Module, task: Task, steps: int, seed: int) -> Iterable[Progress]:
        """Train `model`, whose shapes are those of `dense`, in place, from the weights of that one on.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        return self.thin(model, dense, dense, task, steps, seed)

    def thin(
        self, model: nn.Module, whole: nn.Module, dense: nn.Module, task: Task, steps: int, seed: int
    ) -> Iterable[Progress]:
        """Train `model` in place, from the weights of `whole` on, otherwise as one_shot does.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        last = max(0, min(steps, round(self._until * steps)) - 1)
        make = partial(unmasked(self.course).course, model, dense, task, steps, seed)
        start = partial(model.load_state_dict, whole.state_dict())
        targets = targets_of(model, dense, self.course)
        return MaskedCourse("gradual", make, _Cubic(self._every, last), targets, last + 1, start)


class _Cubic:
    """Masks at each `every`-th step, up to step number `last`."""

    def __init__(self, every: int, last: int) -> None:
        self._every, self._last = every, last

    def __call__(
        self, step: int, parameters: Mapping[str, nn.Parameter], held: Masks, targets: Mapping[str, Target]
    ) -> Masks | None:
        if step != self._last and not (0 < step < self._last and step % self._every == 0):
            return None
        left = 0.0 if step == self._last else (1.0 - step / self._last) ** 3
        kept = {name: t.kept + round(left * (parameters[name].numel() - t.kept)) for name, t in targets.items()}
        return {name: t.mask(parameters[name], kept[name], held.get(name)) for name, t in targets.items()}
