"""Losses: the values that their names promise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Categorical, kl_divergence

from autoprune.losses.bernoulli_kl import bernoulli_kl
from autoprune.losses.cosine import cosine
from autoprune.losses.kl import kl
from autoprune.losses.mse import mse

DENSE, OUTPUTS = torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(1))


def test_kl_is_the_divergence_from_dense_to_pruned_over_the_classes_of_each_pixel() -> None:
    p, q = (Categorical(logits=t.movedim(1, -1)) for t in (DENSE, OUTPUTS))
    assert torch.allclose(kl(OUTPUTS, DENSE, classes=1), kl_divergence(p, q).flatten(1).mean(1), atol=1e-6)


def test_kl_does_not_see_what_moves_all_classes_of_a_pixel_alike() -> None:
    assert float(kl(DENSE + 5 * OUTPUTS[:, :1], DENSE, classes=1).max()) < 1e-5


def test_bernoulli_kl_is_the_divergence_from_dense_to_pruned_of_each_label() -> None:
    p, q = Bernoulli(logits=DENSE), Bernoulli(logits=OUTPUTS)
    expected = kl_divergence(p, q).flatten(1).mean(1)
    assert torch.allclose(bernoulli_kl(OUTPUTS, DENSE, classes=1), expected, atol=1e-6)
    assert bernoulli_kl(torch.tensor([-200.0]), torch.tensor([200.0]), classes=-1).item() == pytest.approx(200.0)


def test_mse_is_one_minus_r_squared_whatever_the_outputs_mean_and_scale() -> None:
    outputs, dense = OUTPUTS.flatten()[:, None], DENSE.flatten()[:, None]
    share = float(F.mse_loss(outputs, dense) / dense.var(correction=0))
    assert float(mse(outputs, dense, classes=-1).mean()) == pytest.approx(share, rel=1e-5)
    moved = mse(1000 * outputs + 3000, 1000 * dense + 3000, classes=-1)
    assert float(moved.mean()) == pytest.approx(share, rel=1e-3)


def test_mse_of_constant_outputs_is_relative_to_their_mean_square() -> None:
    assert mse(torch.full((3, 1), 2.2), torch.full((3, 1), 2.0), classes=-1).tolist() == pytest.approx([0.01] * 3)


def test_losses_take_outputs_of_one_value_a_sample_without_an_axis_of_its_own() -> None:
    flat, column = (OUTPUTS.flatten()[:6], DENSE.flatten()[:6]), (OUTPUTS.view(-1, 1)[:6], DENSE.view(-1, 1)[:6])
    for loss in (mse, bernoulli_kl, cosine):
        assert loss(*flat, classes=-1).tolist() == loss(*column, classes=-1).tolist()


def test_vectors_of_zeros_are_equal_by_cosine() -> None:
    assert cosine(torch.zeros(2, 3), torch.zeros(2, 3), classes=-1).tolist() == [0.0, 0.0]
