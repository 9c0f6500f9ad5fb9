"""Labels: from which position of which layer's side the values of an activation come, and which positions meet.

A label array has the shape of its activation and holds numbers of places, 0 where nobody's values are. It is float64,
in which every operation that moves values about is defined; dimensions along which it only repeats have stride 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from autoprune.tracing.couple import Closure, Reach, Side
from autoprune.tracing.spread import IntArray

Key = tuple[str, Side, int | None]
"""A side of a module, or a dimension of a raw tensor."""


@dataclass
class Places:
    """A number for every position of every side that an activation met, and the pairs that go together."""

    starts: dict[Key, int] = field(default_factory=dict)
    sizes: dict[Key, int] = field(default_factory=dict)
    lost: list[tuple[IntArray, str]] = field(default_factory=list)
    _pairs: list[Tensor] = field(default_factory=list)
    _next: int = 1

    def labels(self, key: Key, size: int) -> Tensor:
        """The numbers of all `size` positions of a side, float64 [size]."""
        if key not in self.starts:
            self.starts[key], self.sizes[key] = self._next, size
            self._next += size
        return torch.arange(size, dtype=torch.float64) + self.starts[key]

    def tie(self, one: Tensor, other: Tensor) -> None:
        """What lies at the same place of two label arrays, which are broadcast, goes together."""
        one, other = torch.broadcast_tensors(one, other)
        one, other = _both_thin(one, other)
        differ = (one > 0) & (other > 0) & (one != other)
        if bool(differ.any()):
            pairs = torch.unique(one[differ].long() * self._next + other[differ].long())  # far faster than of columns
            self._pairs.append(torch.stack([pairs // self._next, pairs % self._next]))

    def merge(self, labels: Tensor, dims: Sequence[int]) -> Tensor:
        """What lies along `dims` goes together; these dimensions are 1 afterwards."""
        shape = [1 if d in dims else n for d, n in enumerate(labels.shape)]
        thin = _thin(labels)
        for dim in dims:
            thin = thinned(thin, [dim])
            if thin.shape[dim] > 1:
                first = thin.amax(dim, keepdim=True)
                self.tie(first, thin)
                thin = first
        return thin.expand(shape)

    def meet(self, shape: Sequence[int], given: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
        """What an element-wise operation gives, from (labels, values) of its operands; None without labels.

        What lies over each other goes together; one value that is broadcast to many channels goes with none of them.
        """
        met: Tensor | None = None
        for i, (labels, values) in enumerate(given):
            others = [x for j, (x, _) in enumerate(given) if j != i]
            if any(_varies(x, -d) for d in range(1, len(shape) + 1) if _spread(values, -d, shape) for x in others):
                continue
            if met is None:
                met = labels
            else:
                self.tie(met, labels)
                met = _filled(met, labels)
        if met is None:
            return None
        return met.expand(*shape) if met.dim() <= len(shape) else met

    def lose(self, labels: Tensor, operation: str) -> None:
        """Nobody knows where these go behind `operation`."""
        known = torch.unique(_thin(labels)).long()
        self.lost.append((known[known > 0].numpy(), operation))

    def closures(self) -> tuple[Closure, ...]:
        """One closure for every side whose positions meet others, or that is made; makers first."""
        keys = sorted(self.starts, key=lambda k: self.starts[k])
        starts = np.array([self.starts[k] for k in keys], np.int64)
        pairs = torch.cat(self._pairs, 1).numpy() if self._pairs else np.empty((2, 0), np.int64)
        one, other = np.unique(pairs, axis=1)
        sides = np.searchsorted(starts, one, "right") - 1, np.searchsorted(starts, other, "right") - 1
        reaches: dict[int, list[Reach]] = {i: [self._itself(k)] for i, k in enumerate(keys)}
        both = np.stack(sides)
        for a, b in np.unique(both, axis=1).T:
            here = (both[0] == a) & (both[1] == b)
            name, side, dim = keys[b]
            reaches[a].append(Reach(name, side, one[here] - starts[a], other[here] - starts[b], dim))
        for number, (places, operation) in enumerate(self.lost):
            at = np.searchsorted(starts, places, "right") - 1
            for a in np.unique(at):
                roots = places[at == a] - starts[a]
                reaches[a].append(Reach(f"<{number}>", "carry", roots, np.zeros_like(roots), None, operation))
        return tuple(Closure(k[0], tuple(reaches[i]), k[1], k[2]) for i, k in enumerate(keys))

    def _itself(self, key: Key) -> Reach:
        everything: IntArray = np.arange(self.sizes[key], dtype=np.int64)
        return Reach(key[0], key[1], everything, everything, key[2])


def thinned(labels: Tensor, dims: Sequence[int]) -> Tensor:
    """Labels with 1 in place of those of `dims` along which they only repeat."""
    for dim in dims:
        if labels.shape[dim] > 1 and (labels.stride(dim) == 0 or not _varies(labels, dim)):
            labels = labels.narrow(dim, 0, 1)
    return labels


def repeated(labels: Tensor) -> Tensor:
    """The same labels, with stride 0 wherever they only repeat."""
    return thinned(labels, range(labels.dim())).expand(labels.shape)


def _thin(labels: Tensor) -> Tensor:
    for dim in range(labels.dim()):
        if labels.stride(dim) == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def _both_thin(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    for dim in range(one.dim()):
        if one.shape[dim] > 1 and one.stride(dim) == other.stride(dim) == 0:
            one, other = one.narrow(dim, 0, 1), other.narrow(dim, 0, 1)
    return one, other


def _varies(labels: Tensor, dim: int) -> bool:
    """Whether labels differ along a dimension, counted from the end."""
    if labels.dim() < abs(dim) and dim < 0:
        return False
    if labels.shape[dim] < 2 or labels.stride(dim) == 0:
        return False
    labels = _thin(labels) if dim < 0 else labels
    return bool((labels != labels.narrow(dim, 0, 1)).any())


def _spread(values: Tensor, dim: int, shape: Sequence[int]) -> bool:
    """Whether one value is broadcast along a dimension, counted from the end."""
    if shape[dim] < 2:
        return False
    return values.dim() < -dim or values.shape[dim] == 1 or values.stride(dim) == 0


def _filled(one: Tensor, other: Tensor) -> Tensor:
    """`one`, and where it is nobody's the other; as thin as both are."""
    one, other = torch.broadcast_tensors(one, other)
    shape = one.shape
    one, other = _both_thin(one, other)
    return torch.where(one > 0, one, other).expand(shape)
