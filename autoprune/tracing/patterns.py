"""Patterns of zeros that hardware knows: at most n of every m inputs that lie side by side are not zero."""

from __future__ import annotations

from torch import Tensor

MATRIX = 2
"""Dimensions of a weight that has inputs and outputs, at least."""


def follows(weight: Tensor, n: int, m: int, dim: int = 1) -> bool:
    """Whether at most `n` of every `m` consecutive positions of dimension `dim`, its inputs, are not zero.

    Of a convolution these are input channels at one position of the kernel. Inputs that m does not divide hold no
    pattern. Mishra et al. 2021, "Accelerating sparse deep neural networks" (2:4).
    """
    if weight.dim() < MATRIX or weight.shape[dim] % m or not weight.numel():
        return False
    runs = (weight.detach() != 0).movedim(dim, -1).unflatten(-1, (-1, m))
    return bool((runs.sum(-1) <= n).all())
