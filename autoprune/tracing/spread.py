"""How far a producer's channels spread over torch-pruning's graph: every position of a node is walked once.

torch-pruning's own walk compares lists of positions and has no end where channels meet themselves at other places
(x + cat([-x[..., 8:], x[..., :8]], -1) of rotary positions, grouped queries, windows). Positions are finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

IntArray = npt.NDArray[np.int64]
Place = tuple[Any, Any]
"""A node and the side of it that is cut, which torch-pruning names by a function."""


@dataclass(slots=True)
class Spread:
    """What the channels of one producer reach.

    `arrived` maps a place, in the order of arrival, to the first root channel at each of its positions, -1 where none
    came; `ties` are pairs of root channels that met at one position.
    """

    arrived: dict[Place, IntArray] = field(default_factory=dict)
    ties: list[tuple[IntArray, IntArray]] = field(default_factory=list)

    def holds(self, place: Place, positions: IntArray) -> bool:
        """Whether something arrived at all `positions` before."""
        known = self.arrived.get(place)
        return known is not None and positions.max() < len(known) and bool((known[positions] >= 0).all())

    def note(self, place: Place, positions: IntArray, roots: IntArray) -> None:
        """Root channels `roots` arrive at `positions`."""
        known = _grown(self.arrived.get(place, np.empty(0, np.int64)), int(positions.max()) + 1)
        unique, index = np.unique(positions, return_index=True)
        fresh = known[unique] < 0
        known[unique[fresh]] = roots[index[fresh]]
        self.arrived[place] = known
        other = known[positions] != roots
        if other.any():
            self.ties.append((known[positions[other]], roots[other]))


def spread_channels(graph: Any, lost: Mapping[Any, str], root: nn.Module, widest: int) -> Spread:
    """Follow all output channels of `root`; what arrives at a node in `lost` stays there, or goes unseen if it is "".

    No node has more than `widest` channels, so a wrong mapping in a loop does not count up without end.
    """
    pruner = graph.get_pruner_of_module(root)
    channels = np.arange(pruner.get_out_channels(root), dtype=np.int64)
    spread, walked = Spread(), Spread()
    start: Place = (graph.module2node[root], pruner.prune_out_channels)
    spread.note(start, channels, channels)
    stack, visited = [(start, channels, channels)], set()
    while stack:
        place, positions, roots = stack.pop()
        node, side = place
        visited.add(node)
        if walked.holds(place, positions) or node in lost:
            continue
        walked.note(place, positions, positions)
        for dep in node.dependencies:
            if not dep.is_triggered_by(side) or lost.get(dep.target) == "":
                continue
            there, came = _mapped(dep, positions, roots) if dep.target not in lost else (positions, roots)
            real = (there >= 0) & (there < widest)
            there, came = there[real], came[real]
            if len(there) == 0:
                continue
            target: Place = (dep.target, dep.handler)
            known = dep.target in visited and spread.holds(target, there)
            spread.note(target, there, came)
            if not known:
                stack.append((target, there, came))
    return spread


def follows(mapping: Any) -> bool:
    """Whether positions can be mapped by it: one of grouped queries forgets roots, of a split some have no end."""
    offset = getattr(mapping, "offset", (0, 0))
    return type(mapping).__name__ != "_GQAIndexMapping" and len(offset) == 2


def _mapped(dep: Any, positions: IntArray, roots: IntArray) -> tuple[IntArray, IntArray]:
    """Positions at the other end of an edge, and the roots that go there."""
    for mapping in dep.index_mapping:
        if mapping is not None:
            index, positions = _step(mapping, positions)
            roots = roots[index]
    return positions, roots


def _step(mapping: Any, p: IntArray) -> tuple[IntArray, IntArray]:
    """(which of the positions go on, where they arrive), by torch-pruning's kinds of mappings."""
    everything = np.arange(len(p))
    kind, back = type(mapping).__name__, mapping.reverse
    if kind == "_FlattenIndexMapping":
        if back:
            return everything, p // mapping._stride
        run = np.arange(mapping._stride)
        return np.repeat(everything, mapping._stride), (p[:, None] * mapping._stride + run).reshape(-1)
    if kind == "_SliceIndexMapping":
        if back:
            return everything, p * mapping.step + mapping.start
        inside = np.nonzero((p >= mapping.start) & (p < mapping.end) & ((p - mapping.start) % mapping.step == 0))[0]
        return inside, (p[inside] - mapping.start) // mapping.step
    if kind in ("_ConcatIndexMapping", "_SplitIndexMapping"):
        if back == (kind == "_SplitIndexMapping"):
            return everything, p + mapping.offset[0]
        inside = np.nonzero((p >= mapping.offset[0]) & (p < mapping.offset[1]))[0]
        return inside, p[inside] - mapping.offset[0]
    raise NotImplementedError(f"torch-pruning maps channels by {kind}")


def _grown(array: IntArray, size: int) -> IntArray:
    if len(array) >= size:
        return array
    return np.concatenate([array, np.full(size - len(array), -1, np.int64)])
