"""Weights of our own: the same for the same number, of the model's size, and alive."""

from __future__ import annotations

import torch
from torch import nn

from autoprune.tracing.scramble import MOST_DRAWN, noisy, scramble


def model_of(scale: float) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 8, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def test_a_number_names_the_weights_and_no_channel_is_left_out() -> None:
    one, same, other = model_of(1.0), model_of(1.0), model_of(1.0)
    for model, number in ((one, 0), (same, 0), (other, 1)):
        scramble(model, number)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    norm = one[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    assert float(norm.running_var.min()) >= 0.5
    assert float(norm.weight.detach().abs().min()) > 0.01


def test_zero_and_huge_weights_become_ones_that_signals_survive() -> None:
    for scale in (0.0, 1e-6, 1e3):
        model = model_of(scale)
        scramble(model, 0)
        out = model.eval()(torch.randn(2, 3, 8, 8))
        assert 1e-3 < float(out.detach().std()) < 1e3


def test_inputs_get_noise_and_ids_none() -> None:
    ids, zeros = torch.arange(6), torch.zeros(4)
    out_ids, (out_zeros,) = noisy((ids, [zeros]))
    assert torch.equal(out_ids, ids)
    assert float(out_zeros.std()) > 0.1
    assert torch.equal(zeros, torch.zeros(4))


def test_rows_of_a_tensor_larger_than_what_is_drawn_differ() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(2048, 2200, bias=False).double()
    scramble(layer, 0)
    drawn = layer.weight.detach().flatten()
    assert torch.equal(drawn[MOST_DRAWN:], drawn[: len(drawn) - MOST_DRAWN])
    assert len(torch.unique(layer.weight.detach()[:, :2], dim=0)) == 2200
    assert len(torch.unique(layer.weight.detach()[:2], dim=1)[0]) == 2048
