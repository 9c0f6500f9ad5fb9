"""Weights as matrices that keep their shape, as groups: how many of their numbers stay, in how many bits each lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Final

from autoprune.errors import InputError
from autoprune.structure import PATTERN, Group, Op, Structure, TensorSpec

PRECISIONS = (32, 8)
"""Bits that a number may have: float32, and signed integers with a scale an output."""
LEAST_SIDE = 16
"""Rows and columns from which on a matrix is worth a scale for each output; smaller ones stay as they are."""
FLAT = 2
"""Dimensions of a weight that is no convolution's."""
WEIGHT: Final = "weight"
"""What a space calls single weights, and their kind."""
EMBEDDING = "Embedding"
"""What the classes of tables have in their names."""
TOGETHER = ("head", "kv_group", "neuron")
"""Kinds whose producers lie side by side in a layer (query, key and value; gate and up): one precision for all."""


DENSITIES = (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
"""Shares of the numbers of a matrix that may stay; those that leave less than one a row are left out."""


def sparse_pattern(granularity: Sequence[str]) -> str | None:
    """The pattern "n:m" that a space's granularity names, "" for single weights, None where it leaves zeros alone.

    Raises:
        InputError: a pattern beside single weights or another one, or one that is none.
    """
    patterns = [word for word in granularity if ":" in word]
    for word in patterns:
        try:
            numbers_of(word)
        except InputError as error:
            raise InputError(f"space.granularity: {error}") from None
    found = [word for word in granularity if word in (WEIGHT, *patterns)]
    if len(found) > 1:
        raise InputError(f"space.granularity: {' and '.join(found)} exclude each other; name one of them")
    return next((word.removeprefix(WEIGHT) for word in found), None)


def numbers_of(pattern: str) -> tuple[int, int]:
    """(n, m) of "n:m".

    Raises:
        InputError: it is no such pattern.
    """
    kept, _, of = pattern.partition(":")
    if not PATTERN.fullmatch(pattern) or int(kept) >= int(of):
        raise InputError(f"{pattern!r} is no pattern n:m with n below m, such as 2:4")
    return int(kept), int(of)


def with_weights(structure: Structure, pattern: str = "") -> Structure:
    """`structure` with a group of kind `weight` for every matrix of a layer, called as its tensor.

    The width is how many of its numbers stay. With a `pattern` "n:m" its grid is that share and all, and matrices whose
    inputs do not divide by m move to `frozen`, as do those that read one channel. The groups of such a structure tell
    weights apart by no atoms: which of them stay is a mask. The fingerprint stays.

    Raises:
        InputError: no weight of the model can hold the pattern.
    """
    made, frozen = list[Group](), dict(structure.frozen)
    kept, of = numbers_of(pattern) if pattern else (0, 1)
    for op, spec in _matrices(structure):
        if _depthwise(spec):
            frozen[spec.name] = "each of its outputs reads one channel: it stays dense"
            continue
        count, inputs = prod(spec.shape), spec.shape[1 - op.outputs]
        if inputs % of:
            frozen[spec.name] = f"it reads {inputs} inputs, which {pattern} does not divide: it stays dense"
            continue
        # rounded down, so that one density for all matrices is within a budget of that density
        widths = [count * kept // of] if pattern else [int(share * count + 1e-6) for share in DENSITIES]
        grid = {w for w in widths if w >= spec.shape[op.outputs]} | {count}
        made.append(Group(spec.name, WEIGHT, count, (), tuple(sorted(grid)), matrices=(spec.name,), pattern=pattern))
    if not made:
        why = f": the inputs of none divide by {of}" if pattern and weights_of(structure) else ""
        raise InputError(f"space.granularity: no weight of the model can be {pattern or 'sparse'}{why}")
    return Structure((*structure.groups, *made), structure.ops, frozen, structure.fingerprint)


def weights_of(structure: Structure) -> list[tuple[Op, TensorSpec]]:
    """The matrices that zeros may be searched in, with the layers that own them, in execution order.

    Embeddings, norms, biases, weights that an embedding shares and convolutions that read one channel are none.
    """
    return [(op, spec) for op, spec in _matrices(structure) if not _depthwise(spec)]


def with_precisions(structure: Structure, bits: Sequence[int]) -> Structure:
    """`structure` with a group of kind `bits` for every matrix, or the matrices that belong together, of a layer.

    They are called `<weight>@bits`; their width is the bits of a number and their grid `bits`. What computes the
    outputs of the same heads or neurons has one precision. Embeddings, norms, biases, weights that an embedding shares,
    depthwise convolutions and matrices with a side below 16 are no such groups. The fingerprint stays.

    Raises:
        InputError: no weight of the model is such a matrix.
    """
    sets = _sets(structure)
    if not sets:
        raise InputError(
            f"space.bits: no weight of the model can be stored in fewer bits (float32, both sides >= {LEAST_SIDE})"
        )
    made = [
        Group(f"{names[0]}@bits", "bits", max(bits), (), tuple(sorted(bits)), matrices=tuple(names)) for names in sets
    ]
    groups = (*structure.groups, *made)
    return Structure(groups, structure.ops, dict(structure.frozen), structure.fingerprint)


def _sets(structure: Structure) -> list[list[str]]:
    """Weights by the precision that they share, in execution order."""
    together = {
        part.tensor: group.name
        for group in structure.groups
        if group.kind in TOGETHER
        for part in group.slices
        if part.role == "produce"
    }
    sets: dict[str, list[str]] = {}
    for op in structure.ops:
        if (spec := _own_weight(op)) is not None and _is_matrix(spec):
            sets.setdefault(together.get(spec.name, spec.name), []).append(spec.name)
    return list(sets.values())


def _matrices(structure: Structure) -> Iterator[tuple[Op, TensorSpec]]:
    """Weights of two and more dimensions with the layers that own them, those of embeddings set aside."""
    for op in structure.ops:  # an embedding whose weight makes outputs too has products
        if EMBEDDING not in op.type and (spec := _own_weight(op)) is not None and len(spec.shape) > 1:
            yield op, spec


def _own_weight(op: Op) -> TensorSpec | None:
    """The weight of a product that no other module owns."""
    return next((s for s in op.tensors if s.name == op.weight and op.positions), None)


def _is_matrix(spec: TensorSpec) -> bool:
    rows, columns = spec.shape[0], prod(spec.shape[1:])
    return len(spec.shape) > 1 and not _depthwise(spec) and spec.itemsize == 4 and min(rows, columns) >= LEAST_SIDE


def _depthwise(spec: TensorSpec) -> bool:
    return len(spec.shape) > FLAT and spec.shape[1] == 1
