"""Loss `mse`: squared error as a share of the outputs' variance (one minus R squared), for regression."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from autoprune.losses._samples import mean_by_sample

CONSTANT = 1e-6
"""A variance below this share of the mean square is rounding: the outputs are constant, the mean square scales."""


def mse(outputs: Tensor, dense_outputs: Tensor, *, classes: int) -> Tensor:
    """Squared error relative to the variance of all dense outputs, or to their mean square where they are constant."""
    square = dense_outputs.square().mean()
    variance = dense_outputs.var(correction=0)
    scale = variance.where(variance > CONSTANT * square, square).clamp_min(1e-12)
    return mean_by_sample(F.mse_loss(outputs, dense_outputs, reduction="none")) / scale
