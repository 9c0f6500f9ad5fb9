"""TensorRT, and tensor cores in general: widths that fill their tiles."""

from __future__ import annotations

from dataclasses import replace

from autoprune.deploy import without
from autoprune.structure import Group, Structure

TILE = 8
"""Channels of a tile in half precision; NVIDIA's guide asks for multiples of 8 (of 16 in int8)."""


class Tensorrt:
    """Widths whose every tensor has a multiple of 8 positions in the dimension that shrinks; and the dense one."""

    def restrict(self, structure: Structure) -> Structure:
        """Grids of such widths; what has none smaller than the dense one stays."""
        fitted = {g.name: replace(g, grid=tuple(w for w in g.grid if w == g.width or _fits(g, w))) for g in structure}
        held = Structure(
            tuple(fitted[g.name] for g in structure), structure.ops, structure.frozen, structure.fingerprint
        )
        return without(held, lambda g: None if len(g.grid) > 1 else f"no smaller width in tiles of {TILE} channels")


def _fits(group: Group, width: int) -> bool:
    if not group.narrows:
        return True
    owned: dict[tuple[str, int], int] = {}
    for part in group.slices:
        each = sum(len(part.positions(atom)) for atom in range(width))
        owned[part.tensor, part.dim] = owned.get((part.tensor, part.dim), 0) + each
    return all(positions % TILE == 0 for positions in owned.values())
