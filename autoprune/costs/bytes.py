"""Bytes of all parameters and buffers, weights in their own bits, as a ratio to the dense model."""

from __future__ import annotations

from autoprune.allocation.polynomial import bytes_polynomial
from autoprune.errors import InputError
from autoprune.policy import IntArray, Policy
from autoprune.protocols import FloatArray
from autoprune.structure import Structure


class Bytes:
    """Bytes of all parameters and buffers, weights in their own bits, as a ratio to the dense model."""

    monotone = True

    def __init__(self, structure: Structure) -> None:
        self._polynomial = bytes_polynomial(structure)
        self.dense = float(self._polynomial(Policy.dense(structure).array(structure)))
        if self.dense <= 0:
            raise InputError("cost 'bytes' cannot be used on this model: it has no parameters or buffers")

    def __call__(self, widths: IntArray) -> FloatArray:
        """Widths [..., groups] -> ratio [...]."""
        return self._polynomial(widths) / self.dense
