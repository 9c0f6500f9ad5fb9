"""Widths to the quantities that latency is a sum of: times of single operations and elements written; vectorised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from autoprune.allocation.polynomial import macs_polynomial
from autoprune.costs._latency_table import OpTimes, nearest_levels
from autoprune.errors import InputError
from autoprune.matrices import PRECISIONS
from autoprune.policy import IntArray
from autoprune.protocols import FloatArray
from autoprune.structure import Group, Slice, Structure, TensorSpec

FEATURES = ("ops", "elements", "macs", "float_ops", "int8_ops")
"""Summed times of single operations; elements that they write (norms, activations and sums go with it); MACs; and where
weights may be stored in 8 bits, the times in float32 of those that are not, and of those that are, above the dense
model's: what 8 bits save or cost is fitted to whole models that were measured with them."""


BoolArray = npt.NDArray[np.bool_]


class Features:
    """Called with widths [..., groups]: the features [...] by name, each relative to the dense model, where it is 1.

    `untouched` is the share of the dense model's `ops` and `macs` that no group narrows.
    """

    def __init__(self, structure: Structure, ops: Sequence[OpTimes], names: Sequence[str] = FEATURES) -> None:
        uses = [(op, weight, calls) for op in ops for weight, calls in op.uses]
        specs = _weights(structure)
        for _, weight, _ in uses:
            if weight not in specs:
                raise InputError(f"the latency table times an unknown weight {weight!r}; remove it to measure anew")
        shapes = [specs[weight].shape for _, weight, _ in uses]
        sides = [side_size(structure, specs[weight], dim) for dim in (0, 1) for _, weight, _ in uses]
        self._slope = np.stack([slope for slope, _ in sides], axis=1) if sides else np.zeros((len(structure), 0))
        self._half = len(uses)
        starts = np.cumsum([0, *(shape[dim] + 1 for dim in (0, 1) for shape in shapes)])[:-1]
        # one flat lookup for all sides: its start is part of the base, so that a size is an index at once
        self._base = np.array([base for _, base in sides]) + starts
        self._place, self._times = _lookup(uses, shapes)
        self._present = Present(structure, [weight for _, weight, _ in uses])
        self._elements = _Elements(structure)
        self._precision = _precision_of(structure, [weight for _, weight, _ in uses])
        dense = np.array([g.width for g in structure.groups], dtype=np.int64)
        self._dense_ms = self._op_ms(dense)
        self._functions: dict[str, Callable[[IntArray], FloatArray]] = {
            "ops": self._op_ms,
            "elements": self._elements,
            "macs": macs_polynomial(structure),
        }
        if (self._precision >= 0).any():
            self._functions |= {"float_ops": self._float_ms, "int8_ops": self._int8_ms}
        known = [name for name in names if name in self._functions]
        self.names = tuple(name for name in known if self._functions[name](dense) > 0)
        self._dense = {name: self._functions[name](dense) for name in self.names}
        still = {"ops": self._untouched_ms, "macs": self._functions["macs"]}  # of no widths only that is left
        none = np.zeros_like(dense)
        self.untouched = {name: float(still[name](none) / self._dense[name]) for name in self.names if name in still}

    def __call__(self, widths: IntArray) -> dict[str, FloatArray]:
        """Widths [..., groups] -> {name: relative to dense [...]}."""
        return {name: self._functions[name](widths) / self._dense[name] for name in self.names}

    def _op_ms(self, widths: IntArray) -> FloatArray:
        return np.asarray(self._each_ms(widths).sum(axis=-1))

    def _each_ms(self, widths: IntArray) -> FloatArray:
        """[..., uses] in float32."""
        sizes = np.asarray(widths, dtype=np.float64) @ self._slope + self._base
        place = self._place[sizes.astype(np.int64)]
        return self._present(widths, self._times[place[..., : self._half] + place[..., self._half :]])

    def _rounded(self, widths: IntArray) -> BoolArray:
        """Which uses [..., uses] have a weight of 8 bits."""
        bits = np.asarray(widths)[..., np.maximum(self._precision, 0)]
        return np.asarray((bits < max(PRECISIONS)) & (self._precision >= 0))

    def _float_ms(self, widths: IntArray) -> FloatArray:
        return np.asarray((self._each_ms(widths) * ~self._rounded(widths)).sum(axis=-1))

    def _int8_ms(self, widths: IntArray) -> FloatArray:
        eight = (self._each_ms(widths) * self._rounded(widths)).sum(axis=-1)
        return np.asarray(eight + self._dense_ms)

    def _untouched_ms(self, none: IntArray) -> FloatArray:
        """Of the uses whose sides no group narrows, and which no block holds; their sizes are the dense ones."""
        moved = np.any(self._slope != 0, axis=0)
        place = self._place[self._base.astype(np.int64)]
        times = self._times[place[: self._half] + place[self._half :]]
        still = ~(moved[: self._half] | moved[self._half :])
        return np.asarray(self._present(none, times * still).sum(axis=-1))


def _precision_of(structure: Structure, weights: Sequence[str]) -> IntArray:
    """For each of some `weights` the index of its precision, -1 where it has none."""
    known = {name: i for i, g in enumerate(structure.groups) if g.kind == "bits" for name in g.matrices}
    return np.array([known.get(weight, -1) for weight in weights], dtype=np.int64)


class Present:
    """Sets to 0 what belongs to absent blocks, one value for each of some `weights`."""

    def __init__(self, structure: Structure, weights: Sequence[str]) -> None:
        held = [(i, {s.tensor for s in g.slices}) for i, g in enumerate(structure.groups) if g.kind == "block"]
        self._blocks = np.array([i for i, _ in held], dtype=np.int64)
        self._of = np.array([[weight in tensors for weight in weights] for _, tensors in held], dtype=np.float64)

    def __call__(self, widths: IntArray, values: FloatArray) -> FloatArray:
        """Widths [..., groups] and values [..., weights] -> the values that are left."""
        if not len(self._blocks):
            return values
        gone = (1.0 - np.asarray(widths)[..., self._blocks]) @ self._of
        return np.asarray(values * (gone == 0))


class _Elements:
    """The elements that all operations with a weight write for one sample: widths [..., groups] -> [...]."""

    def __init__(self, structure: Structure) -> None:
        specs = _weights(structure)
        written = {s.tensor: s.dim for g in structure.groups for s in g.slices if _is_cut(g, s)}
        ops = [op for op in structure.ops if op.weight in specs]
        sides = [(op, side_size(structure, specs[str(op.weight)], written.get(str(op.weight), 0))) for op in ops]
        self._slope = np.stack([op.positions * slope for op, (slope, _) in sides], axis=1) if sides else None
        self._fixed = np.array([op.positions * base for op, (_, base) in sides])
        self._present = Present(structure, [str(op.weight) for op in ops])

    def __call__(self, widths: IntArray) -> FloatArray:
        if self._slope is None:
            return np.zeros(np.shape(widths)[:-1])
        each = np.asarray(widths, dtype=np.float64) @ self._slope + self._fixed
        return np.asarray(self._present(widths, each).sum(axis=-1))


def _is_cut(group: Group, part: Slice) -> bool:
    return group.narrows and part.role in ("produce", "carry")


def side_size(structure: Structure, spec: TensorSpec, dim: int) -> tuple[FloatArray, float]:
    """Size of dimension `dim` of a tensor as (slope [groups], constant), blocks set aside; beyond its shape it is 1."""
    slope = np.zeros(len(structure))
    for index, group in enumerate(structure.groups):
        if not group.narrows:
            continue
        slope[index] = sum(s.repeat for s in group.slices if (s.tensor, s.dim) == (spec.name, dim))
    dense = np.array([g.width for g in structure.groups], dtype=np.float64)
    return slope, float(spec.shape[dim]) - float(slope @ dense)


def attainable(structure: Structure, spec: TensorSpec, dim: int) -> tuple[int, ...]:
    """Sizes that a dimension can have on the grids, ascending; every size between where several groups share it."""
    slope, base = side_size(structure, spec, dim)
    shared = np.flatnonzero(slope)
    grids = [structure.groups[i].grid for i in shared]
    if len(shared) == 0:
        return (spec.shape[dim],)
    if len(shared) == 1:
        sizes = [round(base + slope[shared[0]] * w) for w in grids[0]]
    else:
        low = base + sum(slope[i] * grid[0] for i, grid in zip(shared, grids, strict=True))
        step = int(np.gcd.reduce(slope[shared].astype(np.int64)))
        sizes = list(range(spec.shape[dim], round(low) - 1, -step))
    return tuple(sorted({s for s in sizes if s > 0} | {spec.shape[dim]}))


def _weights(structure: Structure) -> dict[str, TensorSpec]:
    return {spec.name: spec for op in structure.ops for spec in op.tensors if len(spec.shape) > 1}


def _lookup(uses: Sequence[tuple[OpTimes, str, int]], shapes: Sequence[tuple[int, ...]]) -> tuple[IntArray, FloatArray]:
    """(place of every size of every side, all times flat): place of the row + place of the column is a time's index."""
    levels: dict[tuple[tuple[int, ...], int], IntArray] = {}

    def nearest(known: tuple[int, ...], largest: int) -> IntArray:
        key = (known, largest)
        if key not in levels:
            levels[key] = nearest_levels(known, largest)
        return levels[key]

    rows: list[IntArray] = []
    columns: list[IntArray] = []
    times: list[npt.NDArray[Any]] = []
    start = 0
    for (op, _, calls), shape in zip(uses, shapes, strict=True):
        block = np.asarray(op.ms) * calls
        rows.append(start + nearest(op.rows, shape[0]) * len(op.columns))
        columns.append(nearest(op.columns, shape[1]))
        times.append(block.ravel())
        start += block.size
    if not uses:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    return np.concatenate([*rows, *columns]), np.concatenate(times)
