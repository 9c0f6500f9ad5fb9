"""Zeros that a model brings (2:4 patterns, masks): they stay, so such weights are neither compensated nor refitted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PATTERN = 0.25
"""Share of exact zeros from which they are meant; a trained weight has none, but for whole dead channels."""


MEANT = 0.05
"""Share of exact zeros from which a weight of a pruned model is one that is masked."""


def patterned(weight: Tensor) -> bool:
    """Whether the zeros of a weight make a pattern; rows and columns that are zero as a whole do not count."""
    return _share(weight) >= PATTERN


def masked(weight: Tensor) -> bool:
    """Whether the zeros of a pruned model's weight are a mask; rows and columns that are zero as a whole do not count.

    Those are dead channels, which no mask made.
    """
    return _share(weight) >= MEANT


def _share(weight: Tensor) -> float:
    """Exact zeros among all numbers but those of rows and columns that are zero as a whole; 0 of a vector."""
    if weight.dim() < 2:
        return 0.0
    zero = (weight == 0).flatten(2) if weight.dim() > 2 else (weight == 0)[:, :, None]
    alive = zero[~zero.all(2).all(1)][:, ~zero.all(2).all(0)]
    return float(alive.float().mean()) if alive.numel() else 0.0


def patterned_weights(model: nn.Module) -> frozenset[str]:
    """The parameters of a dense model whose zeros stay."""
    with torch.no_grad():
        return frozenset(name for name, p in model.named_parameters() if patterned(p))


def said_of(model: nn.Module) -> str:
    """One sentence for the user; nothing where no weight has a pattern."""
    found = sorted(patterned_weights(model))
    if not found:
        return ""
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"the zeros of {found[0]}{more} stay: weights with such a pattern are neither compensated nor refitted"
