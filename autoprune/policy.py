"""A policy: how wide every group shall be. Integers only; ratios are derived elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autoprune.errors import InputError, did_you_mean
from autoprune.structure import Structure

IntArray = npt.NDArray[np.int64]


def canonical(structure: Structure, widths: IntArray) -> IntArray:
    """Widths [..., groups] with those inside of absent blocks dense: one form for what is the same model."""
    if not structure.inside:
        return widths
    found = widths.copy()
    for block, inner in structure.inside:
        for i in inner:
            found[..., i] = np.where(found[..., block] == 0, structure.groups[i].width, found[..., i])
    return found


@dataclass(frozen=True, slots=True)
class Policy:
    """Widths by group name, sorted, so that equality and hash come for free."""

    widths: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        clean = tuple(sorted((str(name), int(width)) for name, width in self.widths))
        if len({name for name, _ in clean}) != len(clean):
            raise InputError(f"a policy names a group twice: {[name for name, _ in clean]}")
        object.__setattr__(self, "widths", clean)

    @staticmethod
    def of(widths: Mapping[str, int]) -> Policy:
        return Policy(tuple(widths.items()))

    @staticmethod
    def dense(structure: Structure) -> Policy:
        """The zero of pruning: every group at its full width."""
        return Policy(tuple((g.name, g.width) for g in structure.groups))

    @staticmethod
    def from_array(structure: Structure, widths: Iterable[int]) -> Policy:
        """From widths in the order of `structure.groups`; those inside of absent blocks become dense."""
        array = canonical(structure, np.array([*widths], dtype=np.int64))
        return Policy(tuple(zip(structure.names, array.tolist(), strict=True)))

    def as_dict(self) -> dict[str, int]:
        return dict(self.widths)

    def array(self, structure: Structure) -> IntArray:
        """Widths in the order of `structure.groups`, int64 [groups]."""
        widths = dict(self.widths)
        return np.array([widths[name] for name in structure.names], dtype=np.int64)

    def check(self, structure: Structure) -> None:
        """Raise InputError unless the policy names every group of `structure` once, at a width on its grid."""
        widths, names = dict(self.widths), set(structure.names)
        for name in widths:
            if name not in names:
                raise InputError(f"the policy names an unknown group {name!r}; {did_you_mean(name, names)}")
        for group in structure.groups:
            if group.name not in widths:
                raise InputError(f"the policy has no width for group {group.name!r}")
            group.check(widths[group.name])

        for block, inner in structure.inside:
            narrow = [g for i in inner if widths[(g := structure.groups[i]).name] < g.width]
            if narrow and not widths[structure.groups[block].name]:
                raise InputError(
                    f"the policy leaves out block {structure.groups[block].name!r}, and group {narrow[0].name!r} "
                    f"inside it is {widths[narrow[0].name]} wide; there it must be dense, {narrow[0].width}"
                )

    @property
    def digest(self) -> str:
        """12 hex digits that identify the policy."""
        text = ";".join(f"{name}={width}" for name, width in self.widths)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
