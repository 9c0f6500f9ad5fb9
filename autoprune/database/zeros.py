"""Zeros that are meant: patterns that a model brings, which are neither compensated nor refitted, and masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoprune.tracing.rounding import is_rounded, nearest, output_dim

PATTERN = 0.25
"""Share of exact zeros from which they are meant; a trained weight has none, but for whole dead channels."""
MEANT = 0.05
"""Share of exact zeros from which a training keeps them."""


def patterned(weight: Tensor) -> bool:
    """Whether the zeros of a weight make a pattern; rows and columns that are zero as a whole do not count."""
    return _share(weight) >= PATTERN


def masked(weight: Tensor) -> bool:
    """Whether the zeros of a weight make a mask; rows and columns that are zero as a whole do not count."""
    return _share(weight) >= MEANT


def patterned_weights(model: nn.Module) -> frozenset[str]:
    """The parameters of a dense model whose zeros stay."""
    with torch.no_grad():
        return frozenset(name for name, p in model.named_parameters() if patterned(p))


def masked_weights(model: nn.Module, dense: nn.Module | None = None) -> frozenset[str]:
    """The parameters of a model whose zeros a training keeps.

    With the `dense` model of a pruned one, whose shapes may be cut, zeros of whole rows and columns count as well, but
    for as many as its weight of the same name has: the mask emptied the others. What 8 bits round to zero is no mask.
    """
    own = {} if dense is None else dict(dense.named_parameters())
    with torch.no_grad():
        return frozenset(
            name
            for name, p in model.named_parameters()
            if (masked(p) or (name in own and _emptied(p, own[name]))) and not _rounded_off(model, name, p)
        )


def said_of(model: nn.Module) -> str:
    """One sentence for the user; nothing where no weight has a pattern."""
    found = sorted(patterned_weights(model))
    if not found:
        return ""
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"the zeros of {found[0]}{more} stay: weights with such a pattern are neither compensated nor refitted"


def _share(weight: Tensor) -> float:
    """Share of exact zeros in the rows and columns that are not zero as a whole; 0 of vectors."""
    if weight.dim() < 2:
        return 0.0
    zero = _by_sides(weight == 0)
    alive = zero[~_empty(zero, 0)][:, ~_empty(zero, 1)]
    return float(alive.float().mean()) if alive.numel() else 0.0


def _by_sides(flags: Tensor) -> Tensor:
    """[rows, columns, the rest]."""
    return flags.flatten(2) if flags.dim() > 2 else flags[:, :, None]


def _empty(zero: Tensor, side: int) -> Tensor:
    """Which rows (`side` 0) or columns (1) are zero as a whole, bool."""
    return zero.all(2).all(1 - side)


def _emptied(weight: Tensor, dense: Tensor) -> bool:
    """Whether a weight has zeros in number, as many empty rows and columns set aside as its dense one has."""
    if weight.dim() < 2:
        return False
    zero, own = _by_sides(weight == 0), _by_sides(dense == 0)
    for side in (0, 1):
        aside = _empty(zero, side).nonzero().flatten()[: int(_empty(own, side).sum())]
        left = torch.ones(zero.shape[side], dtype=torch.bool, device=zero.device)
        left[aside] = False
        zero = zero[left] if side == 0 else zero[:, left]
    return zero.numel() > 0 and float(zero.float().mean()) >= MEANT


def _rounded_off(model: nn.Module, name: str, weight: Tensor) -> bool:
    """Whether the zeros of a weight are those that rounding to 8 bits makes.

    Around zero a weight's numbers lie about evenly: half as many round to 0 as to 1 and -1 together.
    """
    side = output_dim(model.get_submodule(name.rpartition(".")[0]))
    if not is_rounded(weight, side):
        return False
    sizes = nearest(weight, side).integers.abs()
    return float((sizes == 0).sum() - (sizes == 1).sum() / 2) < MEANT * sizes.numel()
