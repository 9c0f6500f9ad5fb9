"""Bytes that the cache of keys and values takes a token, as a ratio to the dense model; for models that generate."""

from __future__ import annotations

import numpy as np

from autoprune.errors import InputError
from autoprune.policy import IntArray
from autoprune.protocols import FloatArray
from autoprune.structure import Group, Structure


class KvBytes:
    """Bytes of keys and values a token and layer, summed over the attentions whose heads are searched.

    `dense` is theirs, in the type of the weights. Of what an atom makes, queries are as many as its output layer reads;
    the rest are keys and values. Query heads of one key-value head thus cost nothing, nor do heads in an absent block.
    """

    monotone = True

    def __init__(self, structure: Structure) -> None:
        sizes = {spec.name: spec.itemsize for op in structure.ops for spec in op.tensors}
        self._each = np.array([cached_positions(group) for group in structure.groups], dtype=np.float64)
        self._inside = structure.inside
        self._each *= [sizes.get(group.slices[0].tensor, 0) if group.slices else 0 for group in structure.groups]
        self.dense = float(self._each @ [group.width for group in structure.groups])
        if self.dense <= 0:
            raise InputError("cost 'kv_bytes' cannot be used on this model: no key-value heads of it are searched")

    def __call__(self, widths: IntArray) -> FloatArray:
        """Widths [..., groups] -> ratio [...]."""
        held = np.array(widths, dtype=np.float64)
        for block, inner in self._inside:
            held[..., list(inner)] *= held[..., block, None]
        return np.asarray(held @ self._each / self.dense)


def cached_positions(group: Group) -> int:
    """How many keys and values an atom of a group makes a token; 0 of groups that are no heads."""
    if group.kind not in ("head", "kv_group"):
        return 0
    weights = [s for s in group.slices if s.tensor.endswith("weight") and s.first == 0]
    made = sum(s.repeat for s in weights if s.role == "produce")
    read = sum(s.repeat for s in weights if s.role == "consume")
    return max(made - read, 0)
