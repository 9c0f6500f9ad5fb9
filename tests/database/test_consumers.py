"""What a consumer's rows weigh in the error of a group: the scale of the norm behind, over the outputs' energy."""

from __future__ import annotations

import torch
from torch import nn

from autoprune.database.batches import chunks
from autoprune.database.consumers import Consumer, consumed, consumers_of
from autoprune.database.grams import Gram, collect_grams
from autoprune.tracing.wiring import find_sites
from tests.small import World, world


def consumer(w: World, group: str, weight: str) -> tuple[Consumer, Gram]:
    sites = find_sites(w.model, w.task.example_inputs())
    grams = collect_grams(w.model, {weight}, w.task, chunks(w.seen.statistics, 16))
    assert weight in consumed(w.structure.groups, sites)[group]
    return consumers_of(w.model, w.structure.group(group), [weight], sites, grams)[0], grams[weight]


def test_rows_weigh_by_the_square_of_the_scale_of_the_norm_behind_and_all_energies_make_one() -> None:
    w = world("projection")
    found, gram = consumer(w, "a1.0", "a2.0.weight")
    norm = w.model.get_submodule("a2.1")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    squares = norm.weight.detach().double() ** 2 / (norm.running_var.double() + norm.eps)
    expected = squares / (squares * gram.energy).sum()
    torch.testing.assert_close(found.share[0], expected, rtol=1e-5, atol=0.0)


def test_without_a_norm_all_rows_weigh_alike() -> None:
    w = world("plain")
    found, gram = consumer(w, "fc1", "fc2.weight")
    torch.testing.assert_close(found.share[0], torch.ones(5, dtype=torch.float64) / gram.energy.sum())
