"""Estimates from samples: bootstrap intervals (Efron 1979), intervals over seeds and samples, rank correlation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr
from scipy.stats import t as student_t

from autoprune.errors import InputError

FloatArray = npt.NDArray[np.float64]
RESAMPLES = 2000
LEVEL = 0.95
CHUNK = 1 << 20
"""Resampled values held at once: 8 MiB of each array, whatever the number of samples."""


def interval(
    values: npt.ArrayLike, rng: np.random.Generator, level: float = LEVEL, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """(low, high): the percentile interval of the mean of `values` [samples].

    Raises:
        InputError: there are no values, one is not finite, or `level` is not between 0 and 1.
    """
    sample = _checked(values, 1)
    means = np.concatenate([sample[index].mean(axis=1) for index in _resampled(len(sample), resamples, rng)])
    return _percentiles(means, level)


def loss_interval(sample_losses: Sequence[float]) -> tuple[float, float] | None:
    """The interval of a loss from those of its samples, the same at every call; None where they are not known."""
    return interval(sample_losses, np.random.default_rng(0)) if sample_losses else None


def crossed(differences: npt.ArrayLike, level: float = LEVEL) -> tuple[float, float, float]:
    """(mean, low, high) of `differences` [seeds, samples], where column i is the same sample for every seed.

    Seeds and samples are crossed random factors, so the interval covers other seeds as well as other samples. Each
    takes part with the t quantile of its own degrees of freedom, and the half-widths add in quadrature (MOVER; Zou &
    Donner 2008): half = sqrt(t(S-1)^2 var_seeds + t(N-1)^2 var_samples). The seeds' means bear the noise that neither
    explains, so it is taken out of the samples' part. One row, or one column, says nothing of its factor.

    Raises:
        InputError: there are no values, one is not finite, or `level` is not between 0 and 1.
    """
    table = _checked(differences, 2)
    n_seeds, n_samples = table.shape
    mean, by_seed, by_sample = table.mean(), table.mean(axis=1), table.mean(axis=0)
    rest = table - by_seed[:, None] - by_sample + mean
    noise = float((rest**2).sum()) / max(1, (n_seeds - 1) * (n_samples - 1)) / table.size
    of_samples = max(0.0, _squared_error(by_sample) - (noise if n_seeds > 1 else 0.0))
    half = math.hypot(
        _quantile(n_seeds - 1, level) * math.sqrt(_squared_error(by_seed)),
        _quantile(n_samples - 1, level) * math.sqrt(of_samples),
    )
    return float(mean), float(mean - half), float(mean + half)


def spearman(a: FloatArray, b: FloatArray) -> float:
    """Spearman's rank correlation; 0 where one side does not vary, or there are no two values."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a, b).statistic)


def _resampled(n: int, resamples: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """`resamples` draws of `n` indices with replacement, in chunks [k, n]."""
    rows = max(1, CHUNK // n)
    for start in range(0, resamples, rows):
        yield rng.integers(0, n, size=(min(rows, resamples - start), n))


def _squared_error(means: FloatArray) -> float:
    """The squared standard error of the mean of `means`; 0 where there is one alone."""
    return float(means.var(ddof=1)) / len(means) if len(means) > 1 else 0.0


def _quantile(degrees: int, level: float) -> float:
    """Student's t, two-sided; 0 without a degree of freedom."""
    if not 0.0 < level < 1.0:
        raise InputError(f"the level of an interval must be between 0 and 1, not {level}")
    return float(student_t.ppf((1 + level) / 2, degrees)) if degrees > 0 else 0.0


def _percentiles(means: FloatArray, level: float) -> tuple[float, float]:
    if not 0.0 < level < 1.0:
        raise InputError(f"the level of an interval must be between 0 and 1, not {level}")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _checked(values: npt.ArrayLike, n_dims: int) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != n_dims or not array.size or not np.isfinite(array).all():
        raise InputError(f"a bootstrap needs finite values in {n_dims} dimension(s), not {array.size} of {array.shape}")
    return array
