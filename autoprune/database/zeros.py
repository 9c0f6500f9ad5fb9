"""Zeros that a model brings (2:4 patterns, masks): they stay, so such weights are neither compensated nor refitted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PATTERN = 0.25
"""Share of exact zeros from which they are meant; a trained weight has none, but for whole dead channels."""


def patterned(weight: Tensor) -> bool:
    """Whether the zeros of a weight make a pattern; rows and columns that are zero as a whole do not count."""
    if weight.dim() < 2:
        return False
    zero = (weight == 0).flatten(2) if weight.dim() > 2 else (weight == 0)[:, :, None]
    alive = zero[~zero.all(2).all(1)][:, ~zero.all(2).all(0)]
    return alive.numel() > 0 and float(alive.float().mean()) >= PATTERN


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
