"""Widths, grid positions and the unit cube: the one place where a real number becomes a width."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from autoprune.errors import InputError
from autoprune.policy import IntArray, Policy, canonical
from autoprune.protocols import FloatArray
from autoprune.structure import Structure

TOLERANCE = 1e-6  # atoms; a ratio that was once a width on the grid must find its way back to it


class Codec:
    """Translates between widths, positions on the grids (0 is narrowest) and ratios in the unit cube.

    All arrays are [..., groups] in the order of `structure.groups`; a ratio is width / dense width.
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.dense: IntArray = np.array([g.width for g in structure.groups], dtype=np.int64)
        self.last: IntArray = np.array([len(g.grid) - 1 for g in structure.groups], dtype=np.int64)
        self._start = np.concatenate([[0], np.cumsum(self.last + 1)[:-1]]).astype(np.int64)
        self._grids: IntArray = np.array([w for g in structure.groups for w in g.grid], dtype=np.int64)
        # one ascending array for all grids, each group lifted above the one before: floors are one searchsorted
        self._lift = np.arange(len(self.dense)) * float(self.dense.max(initial=0) + 2)
        self._lifted = self._grids + np.repeat(self._lift, self.last + 1)

    def widths(self, positions: IntArray) -> IntArray:
        """Grid positions -> widths, in their one form (`policy.canonical`)."""
        return canonical(self.structure, np.asarray(self._grids[self._start + positions]))

    def ratios(self, widths: IntArray) -> FloatArray:
        """Widths -> the unit cube."""
        return widths / self.dense

    def floor(self, ratios: npt.ArrayLike) -> IntArray:
        """The unit cube -> positions of the widest grid widths not above; below the grid means its narrowest."""
        wanted = np.clip(np.asarray(ratios, dtype=np.float64), 0.0, 1.0) * self.dense + TOLERANCE
        index = np.searchsorted(self._lifted, wanted + self._lift, side="right") - 1 - self._start
        return np.asarray(np.clip(index, 0, self.last))

    def positions(self, widths: IntArray) -> IntArray:
        """Widths -> grid positions; InputError for a width off its grid."""
        found = self.floor(self.ratios(widths))
        if not np.array_equal(self.widths(found), widths):
            for group, width in zip(self.structure.groups, np.atleast_2d(widths)[0], strict=True):
                group.check(int(width))
            raise InputError("a width is off its group's grid")
        return found

    def encode(self, policy: Policy) -> FloatArray:
        """Policy -> ratios in the unit cube [groups]."""
        return self.ratios(policy.array(self.structure))

    def policy(self, positions: IntArray) -> Policy:
        """Grid positions [groups] -> policy."""
        return Policy.from_array(self.structure, self.widths(positions))
