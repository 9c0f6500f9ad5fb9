"""Weights of prunable matrices that are not zero, as a ratio to the dense model."""

from __future__ import annotations

from autoprune.allocation.polynomial import nonzeros_polynomial
from autoprune.errors import InputError
from autoprune.policy import IntArray, Policy
from autoprune.protocols import FloatArray
from autoprune.structure import Structure


class Nonzeros:
    """Weights of prunable matrices that are not zero, as a ratio to the dense model.

    Counted are the weights of all layers that zeros may be searched in (`matrices.weights_of`), left dense or not; no
    embeddings, norms, biases or depthwise convolutions. The density of a matrix is of what structured groups leave.
    """

    monotone = True

    def __init__(self, structure: Structure) -> None:
        self._polynomial = nonzeros_polynomial(structure)
        self._dense = float(self._polynomial(Policy.dense(structure).array(structure)))
        if self._dense <= 0:
            raise InputError("cost 'nonzeros' cannot be used on this model: it has no matrix that could be sparse")
        self.dense = float(round(self._dense))

    def __call__(self, widths: IntArray) -> FloatArray:
        """Widths [..., groups] -> ratio [...]."""
        return self._polynomial(widths) / self._dense
