"""Rank correlation."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from autoprune.protocols import FloatArray


def spearman(a: FloatArray, b: FloatArray) -> float:
    """Spearman's rank correlation; 0 where one side does not vary, or there are no two values."""
    if len(a) < 2:
        return 0.0
    x, y = rankdata(a), rankdata(b)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
