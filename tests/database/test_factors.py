"""Compensation is the least-squares answer at every width, from one factor, whatever the order of the atoms."""

from __future__ import annotations

import pytest
import torch

from autoprune.database.batches import chunks
from autoprune.database.consumers import Consumer, consumed, consumers_of
from autoprune.database.factors import Factored, Part
from autoprune.database.grams import collect_grams
from autoprune.database.levels import Levels
from autoprune.tracing.wiring import find_sites
from tests.families import FAMILIES
from tests.small import World, world

RIDGE = 1e-3  # of the mean diagonal of the Gram (ALGORITHMS 2.2)


def consumers(w: World, group: str) -> list[Consumer]:
    sites = find_sites(w.model, w.task.example_inputs())
    readers = consumed(w.structure.groups, sites)[group]
    grams = collect_grams(w.model, set(readers), w.task, chunks(w.statistics, 16))
    return consumers_of(w.model, w.structure.group(group), readers, sites, grams)


def least_squares(c: Consumer, kept: torch.Tensor) -> torch.Tensor:
    """W G[:, S] G[S, S]^-1 with the ridge on G, which every order of drops must reach."""
    g = c.second + RIDGE * c.second.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(c.second.shape[1])
    columns = (kept[:, None] * c.block + torch.arange(c.block)).flatten()
    full = torch.zeros_like(c.matrix)
    full[:, :, columns] = c.matrix @ g[:, :, columns] @ torch.linalg.inv(g[:, columns][:, :, columns])
    return full


@pytest.mark.parametrize("family", FAMILIES)
def test_every_width_holds_the_least_squares_weights_of_its_kept_atoms(family: str) -> None:
    w = world(family)
    weights = dict(w.model.named_parameters())
    for group in w.structure.groups:
        found = consumers(w, group.name)
        if group.kind == "block":
            assert not found
            continue
        assert found, f"{group.name} has no consumer"
        order = torch.randperm(group.width, generator=torch.Generator().manual_seed(0))
        for c in found:
            reader = Factored(c.reader, (Part.of(c, order.tolist()),))
            for width in {1, group.width // 2, group.width - 1}:
                kept = order[:width].sort().values
                exact = least_squares(c, kept)
                weight, shift = reader.level(weights[c.reader.weight].detach(), kept)
                torch.testing.assert_close(weight, c.reader.native(exact, kept).float(), rtol=1e-4, atol=2e-5)
                lost = ((c.matrix - exact) @ c.mean[:, :, None]).flatten()
                assert (shift is None) == (c.reader.bias is None)
                if shift is not None:
                    torch.testing.assert_close(shift, lost.float(), rtol=1e-4, atol=1e-6)


def test_a_pattern_of_zeros_stays_and_only_the_mean_is_made_up_for() -> None:
    w = world("plain")
    c = consumers(w, w.structure.groups[0].name)[0]
    reader = type(c.reader)(**{**vars(c.reader), "patterned": True})
    order = list(range(len(c.atoms)))
    kept = torch.arange(3)
    weight, _ = Factored(reader, (Part.of(c, order),)).level(w.model.get_parameter(reader.weight).detach(), kept)
    torch.testing.assert_close(weight, reader.native(c.matrix.float(), kept))


def test_a_large_ill_conditioned_consumer_is_compensated_in_float32_as_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w = world("plain")
    c = consumers(w, w.structure.groups[0].name)[0]
    weight = w.model.get_parameter(c.reader.weight).detach()
    order = list(range(len(c.atoms)))
    exact, _ = Factored(c.reader, (Part.of(c, order),)).level(weight, torch.arange(4))
    monkeypatch.setattr("autoprune.database.factors.SMALL", 0)
    part = Part.of(c, order)
    assert part.factor.dtype == torch.float32
    rounded, _ = Factored(c.reader, (part,)).level(weight, torch.arange(4))
    torch.testing.assert_close(rounded, exact, rtol=1e-3, atol=1e-5)
    monkeypatch.setattr("autoprune.database.factors.CONDITION", 1.0)
    assert Part.of(c, order).factor.dtype == torch.float64


def test_atoms_that_stay_by_their_scores_anyway_change_nothing_to_the_last_bit() -> None:
    w = world("plain")
    group = w.structure.groups[0]
    scores = torch.rand(group.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = scores.argsort(descending=True)[:3].tolist()
    plain, same = (Levels.of(consumers(w, group.name), scores, keep) for keep in (None, best))
    assert torch.equal(plain.order, same.order)
    factors = [[p.factor for r in levels.readers for p in r.parts] for levels in (plain, same)]
    assert all(torch.equal(a, b) for a, b in zip(*factors, strict=True))
    other = sorted(scores.argsort()[:3].tolist())
    assert Levels.of(consumers(w, group.name), scores, other).kept(3).tolist() == other
