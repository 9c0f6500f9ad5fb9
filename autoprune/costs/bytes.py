"""Bytes of all parameters and buffers, weights in their own bits and zeros in one, as a ratio to the dense model."""

from __future__ import annotations

from autoprune.allocation.polynomial import Stored
from autoprune.errors import InputError
from autoprune.policy import IntArray, Policy
from autoprune.protocols import FloatArray
from autoprune.structure import Structure


class Bytes:
    """Bytes of all parameters and buffers, weights in their own bits, as a ratio to the dense model.

    A matrix whose zeros are searched takes the least of two forms: all its numbers, or a bit for each and those that
    are not zero.
    """

    monotone = True

    def __init__(self, structure: Structure) -> None:
        self._stored = Stored(structure)
        self.dense = float(self._stored(Policy.dense(structure).array(structure)))
        if self.dense <= 0:
            raise InputError("cost 'bytes' cannot be used on this model: it has no parameters or buffers")

    def __call__(self, widths: IntArray) -> FloatArray:
        """Widths [..., groups] -> ratio [...]."""
        return self._stored(widths) / self.dense
