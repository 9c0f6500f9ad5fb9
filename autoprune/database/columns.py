"""A weight changed one column after the other, the columns that are still free making up for each (GPTQ, SparseGPT).

The factor R of the Gram gives it from the last column to the first: what the outputs would have of a column, given
those behind it, is where its own choice is measured from (Babai's nearest plane).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from autoprune.database.factors import Factored, Part

Settle = Callable[[int, Tensor], Tensor]
"""From the number of a column and its wanted values [rows] to those that it gets."""
Choose = Callable[[slice, Tensor], Settle]
"""From a block of columns and its wanted values [rows, block], as far as they are known, to how they are settled."""


def walked(target: Tensor, factor: Tensor, choose: Choose, block: int) -> Tensor:
    """Values [rows, n] near `target` where the upper triangular R measures: |R (target - found)| is small.

    `block` columns are settled before the rest hears of them.
    """
    rest, n = torch.zeros_like(target), target.shape[1]
    found = torch.empty_like(target)
    scaled = factor / factor.diagonal()[:, None]
    for start in reversed(range(0, n, block)):
        stop = min(start + block, n)
        wanted = target[:, start:stop] + rest[:, stop:] @ scaled[start:stop, stop:].T
        settle = choose(slice(start, stop), wanted)
        for i in reversed(range(stop - start)):
            at = start + i
            found[:, at] = settle(at, wanted[:, i] + rest[:, at + 1 : stop] @ scaled[at, at + 1 : stop])
            rest[:, at] = target[:, at] - found[:, at]
    return found


def always(settle: Settle) -> Choose:
    """Columns that are settled alike whatever the block is."""

    def choose(_columns: slice, _wanted: Tensor) -> Settle:
        return settle

    return choose


def factors_at(reader: Factored, kept: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """(columns, R) of the parts of a whole matrix of which the `kept` channels (None: all) are left.

    R is upper triangular, R'R the Gram of those columns, which are counted channel by channel, the taps of one side by
    side.
    """
    if kept is None:
        return [(_columns(part.atoms, _taps(part)), part.factor[0]) for part in reader.parts]
    found, start = [], 0
    for part in reader.parts:
        place = torch.isin(part.atoms, kept.cpu()).nonzero()[:, 0]
        if len(place):
            inner = part.factor[0][:, _columns(place, _taps(part)).to(part.factor.device)].double()
            factor = torch.linalg.cholesky(inner.T @ inner, upper=True)
            found.append((_columns(torch.arange(start, start + len(place)), _taps(part)), factor))
            start += len(place)
    return found


def _taps(part: Part) -> int:
    return part.factor.shape[1] // len(part.atoms)


def _columns(channels: Tensor, taps: int) -> Tensor:
    return (channels[:, None] * taps + torch.arange(taps)).flatten()
