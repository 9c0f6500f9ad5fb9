"""Multiply-accumulates with weights that are not zero, as a ratio to the dense model."""

from __future__ import annotations

from autoprune.allocation.polynomial import macs_polynomial
from autoprune.errors import InputError
from autoprune.policy import IntArray, Policy
from autoprune.protocols import FloatArray
from autoprune.structure import Structure


class EffectiveMacs:
    """Multiply-accumulates a sample with weights that are not zero, as a ratio to the dense model.

    The MACs of a layer times the density of its weight; products without a weight count whole. A runtime that does not
    skip zeros takes as long as `macs` say.
    """

    monotone = True

    def __init__(self, structure: Structure) -> None:
        self._polynomial = macs_polynomial(structure, effective=True)
        self._dense = float(self._polynomial(Policy.dense(structure).array(structure)))
        if self._dense <= 0:
            raise InputError("cost 'effective_macs' cannot be used on this model: a sample takes no MACs")
        self.dense = float(round(self._dense))

    def __call__(self, widths: IntArray) -> FloatArray:
        """Widths [..., groups] -> ratio [...]."""
        return self._polynomial(widths) / self._dense
