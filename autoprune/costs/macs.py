"""Multiply-accumulates a sample, as a ratio to the dense model (matmul and conv only; a MAC is not a FLOP)."""

from __future__ import annotations

from autoprune.allocation.polynomial import macs_polynomial
from autoprune.errors import InputError
from autoprune.policy import IntArray, Policy
from autoprune.protocols import FloatArray
from autoprune.structure import Structure


class Macs:
    """Multiply-accumulates a sample, as a ratio to the dense model (matmul and conv only; a MAC is not a FLOP)."""

    monotone = True

    def __init__(self, structure: Structure) -> None:
        self._polynomial = macs_polynomial(structure)
        self.dense = float(self._polynomial(Policy.dense(structure).array(structure)))
        if self.dense <= 0:
            raise InputError("cost 'macs' cannot be used on this model: a sample takes no multiply-accumulates")

    def __call__(self, widths: IntArray) -> FloatArray:
        """Widths [..., groups] -> ratio [...]."""
        return self._polynomial(widths) / self.dense
