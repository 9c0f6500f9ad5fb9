"""What a strategy says of itself, as attributes of its function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from autoprune.structure import Kind

S = TypeVar("S", bound=Callable[..., object])


def declares(*, kinds: Sequence[Kind] | None = None, uses_table: bool = False) -> Callable[[S], S]:
    """Set `kinds` and `uses_table` of the function below; without `kinds` it takes groups of all."""

    def marked(strategy: S) -> S:
        if kinds is not None:
            strategy.__dict__["kinds"] = tuple(kinds)
        strategy.__dict__["uses_table"] = uses_table
        return strategy

    return marked
