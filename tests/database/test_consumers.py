"""What a consumer's rows weigh in the error of a group: the scale of the norm behind, over the outputs' energy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoprune import plugins
from autoprune.database import consumers
from autoprune.database.batches import chunks
from autoprune.database.build import build_database, consumers_by_group
from autoprune.database.consumers import Consumer, consumed, consumers_of, cut_channels
from autoprune.database.grams import Gram, collect_grams
from autoprune.tracing.wiring import find_sites
from tests.database.test_factors import least_squares
from tests.small import World, world, world_of


def consumer(w: World, group: str, weight: str) -> tuple[Consumer, Gram]:
    sites = find_sites(w.model, w.task.example_inputs())
    grams = collect_grams(w.model, {weight}, w.task, chunks(w.statistics, 16))
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


def test_a_consumer_of_too_many_columns_is_cut_between_atoms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of a flattened map: 6 channels of 9 places, at most 20 columns apart, so 2 atoms each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(54, 5)).eval()
    w = world_of(model, (2, 3, 3))
    (group,) = w.structure.groups
    sites = find_sites(model, w.task.example_inputs())
    assert cut_channels([group], sites, model) == {}
    monkeypatch.setattr(consumers, "LARGEST", 20)
    assert cut_channels([group], sites, model) == {"3.weight": [(0, 18), (18, 36), (36, 54)]}
    batches = chunks(w.statistics, 256)
    parts = [c for _, found in consumers_by_group(model, [group], w.task, batches) for c in found]
    assert [c.atoms.tolist() for c in parts] == [[0, 1], [2, 3], [4, 5]]
    database = build_database(model, w.structure, w.seen, plugins.load("criteria", "obs")())
    kept = database.keep(group.name, 4)
    weight = {"3.weight": model[3].weight.detach()}
    entry = database.entries_at({group.name: 4}, weight)[group.name]
    alone = {int(c.atoms[0]): least_squares(c, torch.isin(c.atoms, kept).nonzero()[:, 0]) for c in parts}
    full: Tensor = torch.cat([alone[a] for a in sorted(alone)], 2)
    expected = parts[0].reader.native(full, kept).float()
    torch.testing.assert_close(entry["weight|3.weight"], expected, rtol=1e-3, atol=1e-4)
    assert "3.weight" in " ".join(database.said())


def test_atoms_that_interleave_are_not_torn_apart() -> None:
    assert consumers._ranges([torch.tensor([[0, 3], [1, 4], [2, 5]])], 6, 2) == [(0, 6)]
    pairs, singles = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[4], [5]])
    assert consumers._ranges([pairs, singles], 8, 3) == [(0, 2), (2, 5), (5, 8)]
