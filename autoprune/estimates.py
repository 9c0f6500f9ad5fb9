"""Estimates from samples: bootstrap intervals (Efron 1979, percentile), paired over seeds too, and rank correlation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

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


def paired(
    differences: npt.ArrayLike, rng: np.random.Generator, level: float = LEVEL, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """(mean, low, high) of `differences` [seeds, samples], where column i is the same sample for every seed.

    Seeds and samples are resampled independently of each other (crossed factors; Owen 2007, the pigeonhole bootstrap),
    so the interval covers other seeds as well as other samples. One row, or one column, is resampled as it stands.

    Raises:
        InputError: there are no values, one is not finite, or `level` is not between 0 and 1.
    """
    table = _checked(differences, 2)
    n_seeds, n_samples = table.shape
    means = []
    for index in _resampled(n_samples, resamples, rng):
        shares = rng.multinomial(n_seeds, np.full(n_seeds, 1.0 / n_seeds), size=len(index)) / n_seeds
        means.append(np.take_along_axis(shares @ table, index, axis=1).mean(axis=1))
    return float(table.mean()), *_percentiles(np.concatenate(means), level)


def spearman(a: FloatArray, b: FloatArray) -> float:
    """Spearman's rank correlation; 0 where one side does not vary, or there are no two values."""
    if len(a) < 2:
        return 0.0
    x, y = rankdata(a), rankdata(b)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def _resampled(n: int, resamples: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """`resamples` draws of `n` indices with replacement, in chunks [k, n]."""
    rows = max(1, CHUNK // n)
    for start in range(0, resamples, rows):
        yield rng.integers(0, n, size=(min(rows, resamples - start), n))


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
