"""8-bit weights: what a row's scale is, that rounding once more changes nothing, that compensation helps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autoprune.database.rounding import by_channel, compensated, rounding_scores
from autoprune.structure import Group
from autoprune.tracing.rounding import is_rounded, nearest, output_dim

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


class Up(nn.ConvTranspose2d):
    """A user's own kind of a transposed convolution."""


def test_outputs_lie_where_the_layers_class_says_under_whatever_name() -> None:
    assert [output_dim(layer) for layer in (Up(4, 2, 2), nn.Conv2d(4, 2, 2), nn.Linear(4, 2))] == [1, 0, 0]


def test_numbers_that_nobody_rounded_are_not_taken_for_it() -> None:
    for weight in (torch.randn(64, 1), torch.ones(8, 8), torch.zeros(4, 4), torch.randn(8, 8), torch.ones(3)):
        assert not is_rounded(weight)
    assert is_rounded(nearest(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).weight)


def test_a_matrix_whose_inputs_are_unknown_has_a_score_as_well() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    group = Group("0.weight@bits", "bits", 32, (), (8, 32), matrices=("0.weight",))
    scores = rounding_scores(model, group, [])
    assert scores.shape == (32,)
    assert 0.0 < float(scores[0]) < 1e-3
