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

    def parts(self, widths: IntArray) -> dict[str, float]:
        """Where the predicted time goes at widths [groups], in shares of the dense model's; the ratio is their sum.

        `fixed`: what no width changes, such as starting operations; `untouched`: operations that no group narrows;
        `written`: what goes with the values that are written (norms, activations, sums); `narrowed`: operations that
        groups narrow.
        """
        found, coefficients = self._features(widths), dict(self._coefficients)
        parts = {"fixed": 1.0 - sum(coefficients.values()), "untouched": 0.0, "written": 0.0, "narrowed": 0.0}
        for name, coefficient in coefficients.items():
            still = self._features.untouched.get(name, 0.0)
            parts["untouched"] += coefficient * still
            parts["written" if name == "elements" else "narrowed"] += coefficient * (float(found[name]) - still)
        return parts
