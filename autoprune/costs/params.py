"""Parameters, as a ratio to the dense model; buffers are not parameters."""

from __future__ import annotations

from autoprune.allocation.polynomial import numel_polynomial
from autoprune.errors import InputError
from autoprune.policy import IntArray, Policy
from autoprune.protocols import FloatArray
from autoprune.structure import Structure


class Params:
    """Parameters, as a ratio to the dense model; buffers are not parameters."""

    monotone = True

    def __init__(self, structure: Structure) -> None:
        self._polynomial = numel_polynomial(structure, lambda spec: int(spec.is_parameter))
        self.dense = float(self._polynomial(Policy.dense(structure).array(structure)))
        if self.dense <= 0:
            raise InputError("cost 'params' cannot be used on this model: it has no parameters")

    def __call__(self, widths: IntArray) -> FloatArray:
        """Widths [..., groups] -> ratio [...]."""
        return self._polynomial(widths) / self.dense
