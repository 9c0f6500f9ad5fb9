"""What losses share: from values of any shape to one a sample."""

from __future__ import annotations

from torch import Tensor


def mean_by_sample(values: Tensor) -> Tensor:
    """The mean of each sample's values [samples]; samples lie in dimension 0."""
    return values.reshape(len(values), -1).mean(1)
