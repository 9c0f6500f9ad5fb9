"""Strategies, one file each: closed-form policies, the control arms. Here is how one is taken."""

from __future__ import annotations

from typing import get_args

import numpy as np

from autoprune import plugins
from autoprune.errors import InputError
from autoprune.policy import Policy
from autoprune.protocols import Problem, Strategy
from autoprune.structure import Kind, Structure

SLACK = 1e-9
"""By how much a policy's cost may be above the target: rounding."""


def load_strategy(name: str, structure: Structure) -> Strategy:
    """The strategy called `name`, a file of this folder or a user's "module:function", for `structure`.

    What it answers is looked at: a PluginError names it where it fails, leaves the grids or the target.

    Raises:
        InputError: no such strategy, it is no function, or `structure` has groups of a kind that it does not take.
    """
    found = plugins.load("strategies", name)
    if isinstance(found, type) or not callable(found):
        raise InputError(f"strategy {name!r} must be a function (problem, target) -> policy, not {found!r:.80}")
    kinds: tuple[str, ...] = tuple(getattr(found, "kinds", get_args(Kind)))
    other = sorted({g.kind for g in structure} - set(kinds))
    if other:
        raise InputError(
            f"strategy {name} takes groups of the kind {', '.join(kinds)}, and the space has {', '.join(other)}: "
            f"take another strategy, or leave them out (space.granularity)"
        )
    given: Strategy = found

    def strategy(problem: Problem, target: float) -> Policy:
        with plugins.calling("strategies", name, f"at the target {target:g}"):
            policy = given(problem, target)
            if not isinstance(policy, Policy):
                raise TypeError(f"it gives a {type(policy).__name__}, not a Policy")
            policy.check(problem.structure)
        cost = problem.budget.cost
        reached = float(np.asarray(problem.costs[cost](policy.array(problem.structure))))
        if reached > target + SLACK:
            raise plugins.broken("strategies", name, f"gives a policy of {cost} {reached:.4g} at the target {target:g}")
        return policy

    return strategy


def uses_table(name: str) -> bool:
    """Whether the strategy called `name` declares that it works from the sensitivity table."""
    return bool(getattr(plugins.load("strategies", name), "uses_table", False))
