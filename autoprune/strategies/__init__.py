"""Strategies, one file each: closed-form policies, the control arms. Here is how one is taken."""

from __future__ import annotations

from typing import get_args

from autoprune import plugins
from autoprune.errors import InputError
from autoprune.protocols import Strategy
from autoprune.structure import Kind, Structure


def load_strategy(name: str, structure: Structure) -> Strategy:
    """The strategy called `name`, a file of this folder or a user's "module:function", for `structure`.

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
    strategy: Strategy = found
    return strategy


def uses_table(name: str) -> bool:
    """Whether the strategy called `name` declares that it works from the sensitivity table."""
    return bool(getattr(plugins.load("strategies", name), "uses_table", False))
