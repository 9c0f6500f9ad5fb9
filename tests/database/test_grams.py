"""Grams are moments over the samples, whatever the batches that they came in."""

from __future__ import annotations

import torch
from torch import nn

from autoprune.database.grams import collect_grams
from tests.small import RandomTask


def test_a_gram_holds_mean_second_moment_and_energy_over_all_rows() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    task = RandomTask(linear, (6,), samples=40)
    batches = task.split("calibration")
    x = torch.cat([inputs for inputs, _ in batches]).double() + 0.0
    gram = collect_grams(linear, {"weight"}, task, batches)["weight"]
    torch.testing.assert_close(gram.mean[0], x.mean(0), rtol=1e-5, atol=1e-6)
    (second,) = gram.seconds
    torch.testing.assert_close(second[0], x.T @ x / 40, rtol=1e-5, atol=1e-6)
    without_bias = x @ linear.weight.detach().double().T
    torch.testing.assert_close(gram.energy, without_bias.square().mean(0), rtol=1e-5, atol=1e-6)


def test_ranges_of_channels_are_blocks_of_the_whole_gram() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, 3, padding=1)
    task = RandomTask(conv, (6, 5, 5), samples=16)
    batches = task.split("calibration")
    whole = collect_grams(conv, {"weight"}, task, batches)["weight"]
    cut = collect_grams(conv, {"weight"}, task, batches, {"weight": [(0, 2), (2, 6)]})["weight"]
    assert [len(c) for c in cut.columns] == [18, 36]
    for columns, second in zip(cut.columns, cut.seconds, strict=True):
        torch.testing.assert_close(second, whole.seconds[0][:, columns][:, :, columns])
    assert torch.equal(cut.mean, whole.mean)
