"""The end-to-end correction: which mix of features predicts whole models, and how well it predicts those left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from autoprune.errors import InputError
from autoprune.estimates import spearman
from autoprune.protocols import FloatArray

SURE = 1e3
"""Weight of the one equation that must hold: the dense model costs one."""


@dataclass(frozen=True)
class Fit:
    """`coefficients` of ratio = 1 + sum of coefficient * (feature - 1), and the fits' errors on what they left out."""

    coefficients: Mapping[str, float]
    held_out_error: float
    rank_correlation: float


def fit(features: Mapping[str, FloatArray], ratios: FloatArray) -> Fit:
    """Features (name -> relative to dense [models]) to measured ratios [models]; each model is left out once."""
    if len(ratios) < 3 or not np.all(np.isfinite(ratios)) or np.any(ratios <= 0):
        raise InputError(f"a fit needs 3 or more measured ratios above 0, not {ratios}")
    matrix = np.stack(list(features.values()), axis=1)
    predicted = np.empty_like(ratios)
    for i in range(len(ratios)):
        others = np.arange(len(ratios)) != i
        predicted[i] = 1.0 + (matrix[i] - 1.0) @ solve(matrix[others], ratios[others])
    error = float(np.mean(np.abs(predicted - ratios) / ratios))
    coefficients = dict(zip(features, (float(c) for c in solve(matrix, ratios)), strict=True))
    return Fit(coefficients, error, spearman(predicted, ratios))


def solve(features: FloatArray, ratios: FloatArray) -> FloatArray:
    """Non-negative coefficients [features] whose sum is at most 1 (the rest is a constant), least relative squares."""
    terms = np.column_stack([features, np.ones(len(features))])
    rows = np.vstack([terms / ratios[:, None], np.full(terms.shape[1], SURE)])
    solution, _ = nnls(rows, np.append(np.ones(len(ratios)), SURE))
    return np.asarray(solution[:-1] / solution.sum())
