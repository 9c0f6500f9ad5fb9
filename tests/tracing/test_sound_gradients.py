"""Gradients of strided 1x1 convolutions of few channels, which oneDNN gets wrong in channels_last."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from autoprune.tracing.sound_gradients import SoundGradients


@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
@pytest.mark.parametrize(("rows", "columns"), [(7, 3), (8, 5), (32, 9), (4, 16), (3, 40)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_gradients_are_those_of_double_precision(
    rows: int, columns: int, kernel: int, stride: int | tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, columns, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(rows, columns, kernel, kernel, generator=generator)
    bias = torch.randn(rows, generator=generator)
    found = gradients(x, weight.contiguous(memory_format=torch.channels_last), bias, stride)
    for ours, exact in zip(
        found, gradients(x.double().contiguous(), weight.double(), bias.double(), stride), strict=True
    ):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-4)


def gradients(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int | tuple[int, int]
) -> tuple[torch.Tensor, ...]:
    x, weight, bias = (t.clone().requires_grad_() for t in (x, weight, bias))
    with SoundGradients():
        y = F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)
    return torch.autograd.grad(y.square().sum() / len(x), (x, weight, bias))


def test_what_is_not_at_risk_is_computed_as_ever() -> None:
    x, weight = torch.randn(4, 16, 8, 8), torch.randn(8, 16, 1, 1)
    with SoundGradients():
        assert torch.equal(F.conv2d(x, weight, stride=2), torch.conv2d(x, weight, stride=2))
