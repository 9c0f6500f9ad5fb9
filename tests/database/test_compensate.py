"""Compensation is the least-squares answer, whatever the order of the drops."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from autoprune.database.batches import chunks
from autoprune.database.compensate import drop_atoms
from autoprune.database.consumers import Consumer, consumed, consumers_of
from autoprune.database.grams import collect_grams
from autoprune.tracing.wiring import find_sites
from tests.families import FAMILIES
from tests.small import World, world

RIDGE = 1e-3  # of the mean diagonal of the Gram (ALGORITHMS 2.2)


def consumers(w: World, group: str) -> list[Consumer]:
    sites = find_sites(w.model, w.task.example_inputs())
    readers = consumed(w.structure.groups, sites)[group]
    grams = collect_grams(w.model, set(readers), w.task, chunks(w.seen.statistics, 16))
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
    for group in w.structure.groups:
        found = consumers(w, group.name)
        assert found, f"{group.name} has no consumer"
        for level in drop_atoms(found, group.width):
            for c, matrix in zip(found, level.matrices, strict=True):
                torch.testing.assert_close(matrix, least_squares(c, level.kept), rtol=1e-6, atol=1e-8)


def test_the_widths_are_nested_and_every_order_ends_the_same() -> None:
    w = world("plain")
    group = w.structure.groups[0]
    found = consumers(w, group.name)
    levels = list(drop_atoms(found, group.width))
    for wide, narrow in pairwise(levels):
        assert set(narrow.kept.tolist()) < set(wide.kept.tolist())
    last = levels[group.width // 2]
    gone = [a for a in range(group.width) if a not in last.kept.tolist()]
    again = list(drop_atoms(found, group.width, [*reversed(gone), *last.kept.tolist()]))[len(gone) - 1]
    torch.testing.assert_close(again.matrices[0], last.matrices[0], rtol=1e-6, atol=1e-9)


def test_the_atom_that_goes_first_is_the_one_whose_loss_hurts_least() -> None:
    w = world("plain")
    group = w.structure.groups[0]
    found = consumers(w, group.name)

    def error(atom: int) -> float:
        kept = torch.tensor([a for a in range(group.width) if a != atom])
        total = 0.0
        for c in found:
            g = c.second + RIDGE * c.second.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(
                c.second.shape[1]
            )
            d = c.matrix - least_squares(c, kept)
            total += float((torch.einsum("grc,gcd,grd->gr", d, g, d) * c.share).sum())
        return total

    first = next(iter(drop_atoms(found, group.width)))
    gone = (set(range(group.width)) - set(first.kept.tolist())).pop()
    assert gone == min(range(group.width), key=error)
