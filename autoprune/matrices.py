"""Weights as matrices that keep their shape: in how many bits each may be stored, as groups of the search."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from autoprune.errors import InputError
from autoprune.structure import Group, Op, Structure, TensorSpec

PRECISIONS = (32, 8)
"""Bits that a number may have: float32, and signed integers with a scale an output."""
LEAST_SIDE = 16
"""Rows and columns from which on a matrix is worth a scale for each output; smaller ones stay as they are."""
FLAT = 2
"""Dimensions of a weight that is no convolution's."""
TOGETHER = ("head", "kv_group", "neuron")
"""Kinds whose producers lie side by side in a layer (query, key and value; gate and up): one precision for all."""


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


def _own_weight(op: Op) -> TensorSpec | None:
    """The weight of a product that no other module owns."""
    return next((s for s in op.tensors if s.name == op.weight and op.positions), None)


def _is_matrix(spec: TensorSpec) -> bool:
    rows, columns = spec.shape[0], prod(spec.shape[1:])
    depthwise = len(spec.shape) > FLAT and spec.shape[1] == 1
    return len(spec.shape) > 1 and not depthwise and spec.itemsize == 4 and min(rows, columns) >= LEAST_SIDE
