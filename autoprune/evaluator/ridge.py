"""Ridge regression towards a prior: what a refit solves at each weight, from the rows of one or several batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

REFIT_RIDGE = 1e-2
"""Of the mean diagonal; the shrinkage is towards the database's weights (ALGORITHMS 2b)."""

Rows = tuple[Tensor, Tensor]
"""Input rows [g, n, columns] of one batch, and their targets [g, n, rows]."""


Settle = Callable[[Tensor, Tensor], Tensor]


def ridge_over(
    pieces: Sequence[Rows], prior: Tensor, intercept: bool, settle: Settle | None = None
) -> tuple[Tensor, Tensor]:
    """Minimise |t - u W' - b|^2 / n + ridge |W - prior|^2 for each conv group: W [g, rows, columns], b [g * rows].

    u and t are the rows of all `pieces`, and u is centred in place; prior: [g, rows, columns]. Where there are fewer
    rows than columns, a system as large as the rows is solved (its dual, Saunders et al. 1998): the same minimum.
    `settle` makes of W what can be stored, given the Gram of u [g, columns, columns]; b is fitted to that.
    """
    n, with_mean = sum(u.shape[1] for u, _ in pieces), 1.0 if intercept else 0.0
    ones = [u.new_full((len(u), 1, u.shape[1]), with_mean / n) for u, _ in pieces]
    mu = _sum(one @ u for one, (u, _) in zip(ones, pieces, strict=True))
    mt = _sum(one @ t for one, (_, t) in zip(ones, pieces, strict=True))
    for u, _ in pieces:
        u.sub_(mu)  # before the product: the factors are rounded, and a large mean would drown the rest
    solve = _by_rows if n < prior.shape[2] else _by_columns
    w = solve([(u, t - mt) for u, t in pieces], n, prior.transpose(1, 2)).transpose(1, 2)
    if settle is not None:
        w = settle(w, _sum(_products(u, u) for u, _ in pieces) / n)
    return w, (mt - mu @ w.transpose(1, 2)).flatten()


def shrunk(second: Tensor) -> Tensor:
    """The Gram [g, columns, columns] with the shrinkage towards the prior on its diagonal."""
    return second + _ridge(second.diagonal(dim1=1, dim2=2).mean(1)) * _eye(second)


def _by_columns(pieces: Sequence[Rows], n: int, prior: Tensor) -> Tensor:
    """(u'u / n + ridge)^-1 (u't / n + ridge prior): [g, columns, rows]."""
    with fast_products():
        second = _sum(_products(u, u) for u, _ in pieces) / n
        cross = _sum(_products(u, t) for u, t in pieces) / n
    ridge = _ridge(second.diagonal(dim1=1, dim2=2).mean(1))
    found: Tensor = torch.linalg.solve(shrunk(second), cross + ridge * prior)
    return found


def _by_rows(pieces: Sequence[Rows], n: int, prior: Tensor) -> Tensor:
    """As prior + u' (u u' / n + ridge)^-1 (t - u prior) / n: [g, columns, rows]."""
    u, t = (torch.cat([piece[i] for piece in pieces], 1) for i in (0, 1))
    with fast_products():
        between = u @ u.transpose(1, 2) / n
    ridge = _ridge(between.diagonal(dim1=1, dim2=2).sum(1) / u.shape[2])
    weights: Tensor = torch.linalg.solve(between + ridge * _eye(between), (t - u @ prior) / n)
    return prior + u.transpose(1, 2) @ weights


def _ridge(mean_square: Tensor) -> Tensor:
    """The shrinkage of each conv group, [g, 1, 1]."""
    return REFIT_RIDGE * mean_square.clamp_min(1e-12)[:, None, None]


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[1], dtype=like.dtype, device=like.device)


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(add, tensors)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """A'B for each conv group; one group goes by the plain product, which has the faster kernels."""
    return (a[0].T @ b[0])[None] if len(a) == 1 else a.transpose(1, 2) @ b


@contextmanager
def fast_products() -> Iterator[None]:
    """Float32 products from bfloat16 factors where the CPU has them: a third of the time, 1e-4 of the diagonal."""
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision"):  # torch before 2.9
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
