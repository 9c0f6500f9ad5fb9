"""8-bit weights: what a row's scale is, that rounding once more changes nothing, that compensation helps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoprune.database.rounding import by_channel, compensated
from autoprune.tracing.rounding import nearest

SEEDS = st.integers(0, 1000)


def correlated(n: int, seed: int) -> torch.Tensor:
    """Inputs [rows, n] that depend on each other."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(512, n, generator=rng) @ (torch.randn(n, n, generator=rng) / n + 0.3)


@given(SEEDS, st.sampled_from([0, 1]))
def test_rounding_once_more_changes_nothing_to_the_last_bit(seed: int, dim: int) -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 7 - 3)
    once = nearest(weight, dim)
    again = nearest(once.weight, dim)
    assert torch.equal(once.weight, again.weight)
    assert torch.equal(once.integers, again.integers)
    assert int(once.integers.abs().amax()) == 127
    assert bool(((once.weight - weight).abs() <= 0.51 * once.scales.view([-1, 1] if dim == 0 else [1, -1])).all())


def test_a_quantiser_of_another_library_finds_the_same_integers() -> None:
    weight = nearest(torch.randn(8, 64, generator=torch.Generator().manual_seed(1)))
    scale = np.abs(weight.weight.numpy()).max(1) * 2 / np.float32(254)  # as onnxruntime has it for symmetric weights
    assert np.array_equal(np.round(weight.weight.numpy() / scale[:, None]), weight.integers.numpy())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_compensated_rounding_loses_less_in_the_outputs_than_the_nearest(seed: int) -> None:
    n, rows = 96, 20
    weight = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    inputs = correlated(n, seed)
    found = compensated(weight, "linear", [by_channel(inputs.T @ inputs / len(inputs), 1)])
    losses = [float(((made.weight - weight) @ inputs.T).square().mean()) for made in (found, nearest(weight))]
    assert losses[0] < 0.5 * losses[1]
    assert torch.equal(nearest(found.weight).integers, found.integers)


def test_a_convolution_is_rounded_over_its_channels_and_taps() -> None:
    weight = torch.randn(12, 6, 3, 3, generator=torch.Generator().manual_seed(3))
    inputs = correlated(54, 3)  # columns tap by tap, as Grams count them
    found = compensated(weight, "conv", [by_channel(inputs.T @ inputs / len(inputs), 9)])
    by_tap = [made.weight.permute(0, 2, 3, 1).flatten(1) for made in (found, nearest(weight))]
    exact = weight.permute(0, 2, 3, 1).flatten(1)
    losses = [float(((w - exact) @ inputs.T).square().mean()) for w in by_tap]
    assert losses[0] < losses[1]
    assert found.integers.shape == weight.shape


def test_rows_of_zeros_stay_zero() -> None:
    weight = torch.zeros(4, 32)
    weight[1] = torch.linspace(-1, 1, 32)
    found = nearest(weight)
    assert torch.equal(found.weight[0], torch.zeros(32))
    assert bool(found.weight.isfinite().all())
