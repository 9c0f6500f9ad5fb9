"""The cost polynomial: a sum over operations of products of widths, built once from a Structure; exact, vectorised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod

import numpy as np

from autoprune.errors import InputError
from autoprune.matrices import weights_of
from autoprune.policy import IntArray
from autoprune.protocols import FloatArray
from autoprune.structure import Group, Op, Structure, TensorSpec

BYTE = 8
SCALE = 4
"""Bytes of the scale of an output."""
Affine = tuple[int, tuple[tuple[int, int], ...]]
"""A size as a function of the widths: constant + sum of coefficient * widths[group]."""
Term = tuple[float, tuple[Affine, ...]]
"""A coefficient and the sizes that it multiplies."""


class Products:
    """Coefficients times products of affine sizes: widths [..., groups] -> [..., products]."""

    def __init__(self, n_groups: int, terms: Sequence[Term]) -> None:
        sizes = sorted({f for _, factors in terms for f in factors})
        index = {f: i for i, f in enumerate(sizes)}
        depth = max((len(factors) for _, factors in terms), default=0)
        one = len(sizes)  # the last column is 1: products of fewer sizes are padded with it
        self._base = np.array([float(constant) for constant, _ in sizes] + [1.0])
        self._slope = np.zeros((n_groups, one + 1))
        for i, (_, slopes) in enumerate(sizes):
            for group, coefficient in slopes:
                self._slope[group, i] += coefficient
        # sizes hardly ever depend on two groups, and to look one up takes less than a product of matrices
        alone = n_groups > 0 and bool(np.all(np.count_nonzero(self._slope, axis=0) <= 1))
        self._owner = np.argmax(self._slope != 0, axis=0) if alone else None
        self._rate = self._slope.sum(axis=0)
        padded = [[index[f] for f in factors] + [one] * (depth - len(factors)) for _, factors in terms]
        self._factors = np.array(padded, dtype=np.int64).reshape(len(terms), depth)
        self._coefficients = np.array([coefficient for coefficient, _ in terms], dtype=np.float64)

    def __len__(self) -> int:
        return len(self._coefficients)

    def __call__(self, widths: IntArray) -> FloatArray:
        """Widths [..., groups] -> [..., products]."""
        sizes = self._sizes_at(np.asarray(widths, dtype=np.float64))
        product = np.broadcast_to(self._coefficients, (*np.shape(widths)[:-1], len(self)))
        for column in self._factors.T:
            product = product * sizes[..., column]
        return np.ascontiguousarray(product)  # so that sums of one policy and of many add up in one order

    def _sizes_at(self, widths: FloatArray) -> FloatArray:
        """Widths [..., groups] -> all sizes [..., sizes]."""
        if self._owner is not None:
            return np.asarray(widths[..., self._owner] * self._rate + self._base)
        return np.asarray(widths @ self._slope + self._base)


class Polynomial:
    """Sum of coefficient * product of affine sizes. Called with widths [..., groups], gives absolute costs [...].

    Equal products are merged, so that a network of many alike layers costs microseconds. Values are whole numbers
    and exact in float64 up to 2**53, but for densities.
    """

    def __init__(self, n_groups: int, terms: Iterable[Term]) -> None:
        merged: dict[tuple[Affine, ...], float] = {}
        self._constant = 0.0
        for coefficient, factors in terms:
            if factors:
                key = tuple(sorted(factors))
                merged[key] = merged.get(key, 0) + coefficient
            else:
                self._constant += coefficient
        self._products = Products(n_groups, [(coefficient, factors) for factors, coefficient in merged.items()])

    def __call__(self, widths: IntArray) -> FloatArray:
        """Widths [..., groups] -> cost [...]."""
        return np.asarray(self._products(widths).sum(axis=-1) + self._constant, dtype=np.float64)


def macs_polynomial(structure: Structure, effective: bool = False) -> Polynomial:
    """Multiply-accumulates a sample: positions * numel(weight) summed over the operations.

    `effective` ones are those with weights that are not zero.
    """
    specs = {spec.name: spec for op in structure.ops for spec in op.tensors}
    size, blocks = _sizes(structure), _blocks(structure)
    density = _densities(structure) if effective else {}
    terms: list[Term] = []
    for op in structure.ops:
        if op.weight is None:
            terms.append(_products(op, structure))
        elif op.positions:
            if op.weight not in specs:
                raise InputError(f"operation {op.name!r}: no operation owns its weight {op.weight!r}")
            terms.append(_thinned(_numel(specs[op.weight], op.positions, size, blocks), density.get(op.weight)))
    return Polynomial(len(structure), terms)


def numel_polynomial(structure: Structure, weight_of: Callable[[TensorSpec], int]) -> Polynomial:
    """Elements of all tensors, each counted `weight_of(spec)` times: 1 for parameters."""
    size, blocks = _sizes(structure), _blocks(structure)
    specs = [spec for op in structure.ops for spec in op.tensors]
    return Polynomial(
        len(structure), [_numel(spec, weight_of(spec), size, blocks) for spec in specs if weight_of(spec)]
    )


def nonzeros_polynomial(structure: Structure) -> Polynomial:
    """Weights that are not zero of the matrices that zeros may be searched in, whether they are or not."""
    size, blocks, density = _sizes(structure), _blocks(structure), _densities(structure)
    terms = [_thinned(_numel(s, 1, size, blocks), density.get(s.name)) for _, s in weights_of(structure)]
    return Polynomial(len(structure), terms)


class Stored:
    """Bytes of all tensors. Called with widths [..., groups], gives bytes [...].

    A matrix of fewer bits has a scale of float32 for each of its outputs beside it. One whose zeros are searched takes
    the least of its forms: all its numbers, or a bit for each and those that are not zero; with or without fewer bits.
    """

    def __init__(self, structure: Structure) -> None:
        n, groups = len(structure), structure.groups
        size, blocks = _sizes(structure), _blocks(structure)
        bits = {name: i for i, g in enumerate(groups) if g.kind == "bits" for name in g.matrices}
        density = _densities(structure)
        specs = [(op.outputs, spec) for op in structure.ops for spec in op.tensors]
        sparse = [(side, spec) for side, spec in specs if spec.name in density]
        terms: list[Term] = []
        for side, spec in ((side, spec) for side, spec in specs if spec.name not in density):
            count, factors = _numel(spec, 1, size, blocks)
            if (i := bits.get(spec.name)) is None:
                terms.append((count * spec.itemsize, factors))
                continue
            width, least = groups[i].width, groups[i].grid[0]
            terms.append((count / BYTE, (*factors, (0, ((i, 1),)))))
            if least < width:
                rows = size.get((spec.name, side), (spec.shape[side], ()))
                fewer = (width, ((i, -1),))
                terms.append((SCALE / (width - least), (rows, *blocks.get(spec.name, ()), fewer)))
        self._dense = Polynomial(n, terms)
        self._numbers = Products(n, [_numel(spec, 1, size, blocks) for _, spec in sparse])
        outputs = [size.get((spec.name, side), (spec.shape[side], ())) for side, spec in sparse]
        held = [blocks.get(spec.name, ()) for _, spec in sparse]
        self._scales = Products(n, [(SCALE, (made, *inside)) for made, inside in zip(outputs, held, strict=True)])
        self._group, self._count = np.array([density[spec.name] for _, spec in sparse], dtype=np.int64).reshape(-1, 2).T
        self._bits = np.array([bits.get(spec.name, -1) for _, spec in sparse], dtype=np.int64)
        self._whole = np.array([BYTE * spec.itemsize for _, spec in sparse], dtype=np.float64)

    def __call__(self, widths: IntArray) -> FloatArray:
        """Widths [..., groups] -> bytes [...]."""
        total = self._dense(widths)
        if not len(self._numbers):
            return total
        held = np.asarray(widths, dtype=np.float64)
        numbers, density = self._numbers(widths), held[..., self._group] / self._count
        taken = numbers / BYTE * np.minimum(self._whole, 1 + self._whole * density)
        if (self._bits >= 0).any():
            bits = np.where(self._bits < 0, self._whole, held[..., np.maximum(self._bits, 0)])
            fewer = numbers / BYTE * np.minimum(bits, 1 + bits * density) + self._scales(widths)
            taken = np.where(bits < self._whole, np.minimum(fewer, taken), taken)
        return np.asarray(total + taken.sum(axis=-1))


def _products(op: Op, structure: Structure) -> tuple[int, tuple[Affine, ...]]:
    """The term of an operation without a weight: in proportion to its groups' widths, constant without one."""
    named = [i for i, g in enumerate(structure.groups) if g.name in op.groups]
    dense = prod(structure.groups[i].width for i in named)
    return op.positions // dense, tuple((0, ((i, 1),)) for i in named)


def _numel(
    spec: TensorSpec, coefficient: int, size: Mapping[tuple[str, int], Affine], blocks: Mapping[str, tuple[Affine, ...]]
) -> tuple[int, tuple[Affine, ...]]:
    """The term coefficient * numel(spec), times its blocks: dimensions that never shrink go into the coefficient."""
    factors = [size.get((spec.name, dim)) for dim in range(len(spec.shape))]
    fixed = prod(n for n, factor in zip(spec.shape, factors, strict=True) if factor is None)
    return coefficient * fixed, (*(f for f in factors if f is not None), *blocks.get(spec.name, ()))


def _densities(structure: Structure) -> dict[str, tuple[int, int]]:
    """Matrix -> the group of its zeros, and how many weights the dense one has: their ratio is its density."""
    return {name: (i, g.width) for i, g in enumerate(structure.groups) if g.kind == "weight" for name in g.matrices}


def _thinned(term: Term, density: tuple[int, int] | None) -> Term:
    """The part of a term that a matrix of this density has."""
    if density is None:
        return term
    (coefficient, factors), (group, dense) = term, density
    return coefficient / dense, (*factors, (0, ((group, 1),)))


def _blocks(structure: Structure) -> dict[str, tuple[Affine, ...]]:
    """Tensor -> a factor for each block that it lies in, 0 where that is absent."""
    found: dict[str, tuple[Affine, ...]] = {}
    names = [spec.name for op in structure.ops for spec in op.tensors]
    for index, group in enumerate(structure.groups):
        places = tuple(f"{stand.module}." for stand in group.stands)
        own = {s.tensor for s in group.slices} | {n for n in names if places and n.startswith(places)}
        for tensor in own if group.kind == "block" else ():
            found[tensor] = (*found.get(tensor, ()), (0, ((index, 1),)))
    return found


def _sizes(structure: Structure) -> dict[tuple[str, int], Affine]:
    """(tensor, dim) -> its size as a function of the widths, for the dimensions that shrink; blocks set aside.

    Each atom that goes takes `repeat` positions: size = dense size - sum of repeat * (dense width - width).
    """
    shapes = {spec.name: spec.shape for op in structure.ops for spec in op.tensors}
    sizes: dict[tuple[str, int], tuple[int, dict[int, int]]] = {}
    for index, group in enumerate(structure.groups):
        for key, each in _positions_an_atom(group).items() if group.narrows else ():
            if key[0] not in shapes:
                raise InputError(f"group {group.name!r}: no operation owns its tensor {key[0]!r}")
            constant, slopes = sizes.setdefault(key, (shapes[key[0]][key[1]], {}))
            slopes[index] = each
            sizes[key] = (constant - each * group.width, slopes)
    return {key: (constant, tuple(sorted(slopes.items()))) for key, (constant, slopes) in sizes.items()}


def _positions_an_atom(group: Group) -> dict[tuple[str, int], int]:
    """(tensor, dim) -> positions that each atom owns there; slices may hold some of the atoms each."""
    owned: dict[tuple[str, int], IntArray] = {}
    for piece in group.slices:
        count = group.width if piece.count is None else piece.count
        held = owned.setdefault((piece.tensor, piece.dim), np.zeros(group.width, dtype=np.int64))
        held[piece.first : piece.first + count] += piece.repeat
    for (tensor, _), held in owned.items():
        if (held != held[0]).any():
            raise InputError(f"group {group.name!r}: its width alone does not say how {tensor!r} shrinks")
    return {key: int(held[0]) for key, held in owned.items()}
