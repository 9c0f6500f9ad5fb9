"""Latency, predicted from a table that was measured on the runtime that ships, as a ratio to the dense model."""

from __future__ import annotations

import numpy as np

from autoprune.costs._latency_features import Features
from autoprune.costs._latency_table import LatencyTable
from autoprune.errors import InputError
from autoprune.policy import IntArray
from autoprune.protocols import FloatArray
from autoprune.structure import Structure


class Latency:
    """Predicted latency as a ratio to the dense model; not monotone: a width that suits the kernels may be faster.

    `dense` is the dense model's time in ms. Raises InputError where the table is of another structure.
    """

    monotone = False

    def __init__(self, structure: Structure, table: LatencyTable) -> None:
        if table.structure != structure.fingerprint:
            raise InputError("the latency table was measured on another model; remove it to measure anew")
        used = [name for name, c in table.coefficients.items() if c > 0]
        self._features = Features(structure, table.ops, used)
        self._coefficients = [(name, table.coefficients[name]) for name in self._features.names]
        self.dense = table.dense_ms

    def __call__(self, widths: IntArray) -> FloatArray:
        """Widths [..., groups] -> ratio [...]; exactly 1 at the dense widths."""
        features = self._features(widths)
        ratio = np.ones(np.shape(widths)[:-1])
        for name, coefficient in self._coefficients:
            ratio = ratio + coefficient * (features[name] - 1.0)
        return ratio
