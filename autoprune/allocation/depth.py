"""Widths at a fixed depth: which blocks are absent is given, and the rest is a problem of widths alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from autoprune.allocation.budget import SLACK, Limits
from autoprune.allocation.knapsack import Allocator, predicted_loss
from autoprune.codec import Codec
from autoprune.errors import InputError
from autoprune.policy import IntArray, Policy, canonical
from autoprune.protocols import Cost, FloatArray
from autoprune.structure import Structure


class AtDepth:
    """A cost of the widths that a fixed depth leaves free, as a ratio to the whole dense model.

    `widths` [groups] are all widths, of which those at `free` are replaced.
    """

    def __init__(self, cost: Cost, widths: IntArray, free: IntArray) -> None:
        self.monotone, self.dense = cost.monotone, cost.dense
        self._cost, self._widths, self._free = cost, widths, free

    def __call__(self, widths: IntArray) -> FloatArray:
        """Widths [..., free groups] -> ratio [...]."""
        given = np.asarray(widths)
        whole = np.broadcast_to(self._widths, (*given.shape[:-1], len(self._widths))).copy()
        whole[..., self._free] = given
        return self._cost(whole)


class Depth:
    """The network without the blocks called `absent`: the knapsack over what is left of the groups.

    `penalties` are those of all groups (`knapsack.penalties`).
    """

    def __init__(
        self,
        structure: Structure,
        costs: Mapping[str, Cost],
        penalties: Sequence[FloatArray],
        absent: frozenset[str] = frozenset(),
    ) -> None:
        self.structure, self.absent = structure, absent
        start = np.array([0 if g.name in absent else g.width for g in structure.groups], dtype=np.int64)
        inner = {i for block, held in structure.inside if not start[block] for i in held}
        free = [i for i, g in enumerate(structure.groups) if g.kind != "block" and i not in inner]
        self._widths, self._free = canonical(structure, start), np.array(free, dtype=np.int64)
        self._costs = {name: AtDepth(cost, self._widths, self._free) for name, cost in costs.items()}
        self._penalties = [penalties[i] for i in free]
        left = Structure(tuple(structure.groups[i] for i in free), structure.ops, fingerprint="depth")
        self._codec = Codec(left)
        self._allocator = Allocator(left, self._costs) if free else None

    @property
    def policy(self) -> Policy:
        """All that is left at its dense widths."""
        return Policy.from_array(self.structure, self._widths)

    def cost(self, name: str) -> float:
        """Of `policy`, as a ratio to dense."""
        return float(np.asarray(self._costs[name](self._widths[self._free])))

    def solved(self, limits: Limits) -> tuple[Policy, float] | None:
        """The widths of nearly the least summed penalties within limits, and that sum; None where none are."""
        if self._allocator is None:
            fits = all(self.cost(name) <= limit + SLACK for name, limit in limits.items())
            return (self.policy, 0.0) if fits else None
        try:
            positions = self._allocator.solve(self._penalties, limits)
        except InputError:  # below what the narrowest widths reach
            return None
        widths = self._widths.copy()
        widths[self._free] = self._codec.widths(positions)
        return Policy.from_array(self.structure, widths), float(predicted_loss(self._penalties, positions))
