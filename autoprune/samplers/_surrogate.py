"""What evaluated policies say of those not yet evaluated: a Gaussian process over the ratios of widths."""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular

from autoprune.protocols import FloatArray

LENGTH = 0.2
"""Over what share of the dense width, in every group at once, what one policy says of another fades."""
LINEAR = 0.3
"""Prior spread of the slopes, in spreads of the values, that a group's ratio alone accounts for."""
MIDDLE = 0.5
"""The ratio that slopes are about, so that they say nothing of the common level."""
JITTER = 0.1
"""Least noise, in spreads of the values: two policies of almost the same ratios may still differ."""


class Surrogate:
    """Regression with a squared-exponential and a linear kernel (Rasmussen and Williams 2006, chapter 2).

    Fitted to `ratios` [n, groups] (widths over dense widths) and `values` [n] with their standard errors `noises` [n];
    the values may be in any unit. n is a few hundred at most: a fit takes n^3 / 3 steps.
    """

    def __init__(self, ratios: FloatArray, values: FloatArray, noises: FloatArray) -> None:
        self._ratios = ratios
        self._mean = float(np.mean(values))
        self._spread = float(np.std(values)) or 1.0
        noise = np.hypot(noises / self._spread, JITTER)
        self._factor = cho_factor(self._kernel(ratios, ratios) + np.diag(noise**2), lower=True)
        self._weights = cho_solve(self._factor, (values - self._mean) / self._spread)

    def predict(self, ratios: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Ratios [m, groups] -> (mean [m], standard deviation [m]) of the value without noise."""
        between = self._kernel(ratios, self._ratios)
        explained = np.sum(solve_triangular(self._factor[0], between.T, lower=True) ** 2, axis=0)
        own = 1.0 + LINEAR**2 * np.mean((ratios - MIDDLE) ** 2, axis=1)
        deviation = np.sqrt(np.maximum(own - explained, 0.0))
        return self._mean + self._spread * (between @ self._weights), self._spread * deviation

    def _kernel(self, a: FloatArray, b: FloatArray) -> FloatArray:
        n_groups, products = a.shape[1], a @ b.T
        kernel = np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1)
        kernel -= 2.0 * products
        kernel *= -0.5 / (LENGTH**2 * n_groups)
        np.exp(np.minimum(kernel, 0.0, out=kernel), out=kernel)
        products -= MIDDLE * (np.sum(a, axis=1)[:, None] + np.sum(b, axis=1)) - n_groups * MIDDLE**2
        products *= LINEAR**2 / n_groups
        kernel += products
        return np.asarray(kernel)
