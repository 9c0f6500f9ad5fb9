"""Zeros that move in training: small weights go, where gradients are large others begin (Evci et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial

from torch import Tensor, nn

from autoprune.database.zeros import masked_weights
from autoprune.errors import InputError
from autoprune.evaluator.finetune import Masks
from autoprune.policy import Policy
from autoprune.protocols import Progress, Task
from autoprune.recovery._distilled import Distilled
from autoprune.recovery._masking import MaskedCourse, Target, check_pace, largest, targets_of, with_zeros
from autoprune.structure import Structure


class Rigl:
    """Rigging the Lottery: from the masks of the point, as many weights of each matrix at every step.

    At every `every`-th step a share of them, `fraction` at first and by a cosine nothing at `until` of the steps, is
    exchanged: the smallest weights for those zeros whose gradients are largest. These begin at zero, and take their
    first step at once, with that gradient (in the paper the next one), lest they look like zeros.
    Zeros that the dense model has stay where they are.
    """

    def __init__(
        self, every: int = 20, fraction: float = 0.3, until: float = 0.75, course: Distilled | None = None
    ) -> None:
        check_pace(every, until)
        if isinstance(fraction, bool) or not isinstance(fraction, float | int) or not 0.0 < fraction < 1.0:
            raise InputError(f"recovery.options: fraction must lie between 0 and 1, not {fraction!r}")
        self._every, self._fraction, self._until = every, fraction, until
        self.course = course or Distilled()

    def check_policy(self, structure: Structure, policy: Policy) -> None:
        """InputError where the policy leaves no zeros in any weight, or has them in a pattern."""
        for group in with_zeros(structure, policy, "rigl"):
            if group.pattern:
                raise InputError(
                    f"recovery.schedule: rigl moves zeros wherever gradients are large, and {group.name!r} keeps "
                    f"{group.pattern}; take gradual, lottery or one_shot"
                )

    def __call__(self, model: nn.Module, dense: nn.Module, task: Task, steps: int, seed: int) -> Iterable[Progress]:
        """Train `model` in place, otherwise as one_shot does.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        make = partial(self.course.course, model, dense, task, steps, seed)
        schedule = _Exchange(self._every, self._fraction, round(self._until * steps), masked_weights(dense))
        return MaskedCourse("rigl", make, schedule, targets_of(model, dense, self.course))


class _Exchange:
    """Masks at each `every`-th step before number `end`; those of the weights called `still` do not change."""

    def __init__(self, every: int, fraction: float, end: int, still: frozenset[str]) -> None:
        self._every, self._fraction, self._end, self._still = every, fraction, end, still

    def __call__(
        self, step: int, parameters: Mapping[str, nn.Parameter], held: Masks, targets: Mapping[str, Target]
    ) -> Masks | None:
        if not 0 < step < self._end or step % self._every:
            return None
        share = self._fraction / 2 * (1.0 + math.cos(math.pi * step / self._end))
        found: dict[str, Tensor] = {}
        for name in sorted(targets.keys() - self._still):
            weight, gradient = parameters[name].detach(), parameters[name].grad
            if gradient is not None:
                found[name] = exchanged(weight, gradient, held[name], share)
        return found


def exchanged(weight: Tensor, gradient: Tensor, mask: Tensor, share: float) -> Tensor:
    """`mask` with a share of its weights, the smallest, given for as many others of the largest gradients.

    Among these are the ones just given, as in the paper: such a weight stays as it is. Where fewer zeros have a
    gradient, fewer weights are exchanged.
    """
    count = min(int(share * int(mask.sum())), int((~mask & (gradient != 0)).sum()))
    stay = largest(weight.abs(), int(mask.sum()) - count, mask)
    return stay | largest(gradient.abs(), count, ~stay)
