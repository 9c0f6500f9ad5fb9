"""Bytes that the cache of keys and values takes a token, as a ratio to the dense model; for models that generate."""

from __future__ import annotations

import numpy as np

from autoprune.errors import InputError
from autoprune.policy import IntArray
from autoprune.protocols import FloatArray
from autoprune.structure import Group, Structure

Places = tuple[int, ...]
"""Indices of the blocks that an attention lies in."""


class KvBytes:
    """Bytes of keys and values a token and layer, summed over the attentions whose heads are searched.

    `dense` is theirs, in the type of the weights. Of what an atom makes, queries are as many as its output layer reads;
    the rest are keys and values. Query heads of one key-value head thus cost nothing, nor do heads in an absent block.
    """

    monotone = True

    def __init__(self, structure: Structure) -> None:
        sizes = {spec.name: spec.itemsize for op in structure.ops for spec in op.tensors}
        blocks = [(i, {s.tensor for s in g.slices}) for i, g in enumerate(structure.groups) if g.kind == "block"]
        self._terms: list[tuple[int, Places, float]] = []
        for index, group in enumerate(structure.groups):
            item = sizes.get(group.slices[0].tensor, 0) if group.slices else 0
            for places, each in _cached_positions(group, blocks).items():
                self._terms.append((index, places, float(each * item)))
        self.dense = float(sum(each * structure.groups[index].width for index, _, each in self._terms))
        if self.dense <= 0:
            raise InputError("cost 'kv_bytes' cannot be used on this model: no key-value heads of it are searched")

    def __call__(self, widths: IntArray) -> FloatArray:
        """Widths [..., groups] -> ratio [...]."""
        held = np.asarray(widths, dtype=np.float64)
        parts = [each * held[..., index] * held[..., list(places)].prod(axis=-1) for index, places, each in self._terms]
        return np.asarray(sum(parts) / self.dense)


def _cached_positions(group: Group, blocks: list[tuple[int, set[str]]]) -> dict[Places, int]:
    """How many keys and values an atom of a group makes a token, by the blocks they lie in: heads may span layers."""
    found: dict[Places, int] = {}
    for part in group.slices if group.kind in ("head", "kv_group") else ():
        if part.tensor.endswith("weight") and part.first == 0:
            places = tuple(i for i, tensors in blocks if part.tensor in tensors)
            sign = {"produce": 1, "consume": -1}.get(part.role, 0)
            found[places] = found.get(places, 0) + sign * part.repeat
    return {places: each for places, each in found.items() if each > 0}
