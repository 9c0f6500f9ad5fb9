"""Cut a part, train, cut more: the sparsity rises by a cubic (Zhu & Gupta 2017, To Prune, or Not to Prune)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import nn

from autoprune.errors import InputError
from autoprune.policy import Policy
from autoprune.protocols import Progress, Task
from autoprune.recovery._distilled import Distilled
from autoprune.structure import Structure


class Iterative:
    """`rounds` of cutting, repair and training, each with an equal share of the steps and a course of its own.

    After round r of N the widths are (1 - r/N)^3 of the way from the policy's to the dense ones, and atoms are ranked
    anew among those that are left; so are the weights of a matrix.
    """

    def __init__(self, rounds: int = 3, course: Distilled | None = None) -> None:
        if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= 100:
            raise InputError(f"recovery.options: rounds must be a whole number from 1 to 100, not {rounds!r}")
        self._rounds, self.course = rounds, course or Distilled()

    def path(self, structure: Structure, policy: Policy) -> Sequence[Policy]:
        """The policies on the way, each narrower than the one before; the last one is `policy`."""
        dense, target = (np.asarray(p.array(structure)) for p in (Policy.dense(structure), policy))
        left = [(1.0 - r / self._rounds) ** 3 for r in range(1, self._rounds)]
        # a precision and a pattern change at once, at the end
        whole = np.array([g.kind == "bits" or bool(g.pattern) for g in structure])
        widths = [np.where(whole, dense, np.ceil(target + share * (dense - target))).astype(int) for share in left]
        found = [Policy.from_array(structure, row) for row in widths]
        return [*dict.fromkeys(p for p in found if p not in (policy, Policy.dense(structure))), policy]

    def __call__(self, model: nn.Module, dense: nn.Module, task: Task, steps: int, seed: int) -> Iterable[Progress]:
        """Train `model` in place, as one_shot does: one round's steps.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        return self.course.course(model, dense, task, steps, seed)
