"""Atoms go in the order of least compensated error, exactly that which dropping one after the other by hand gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from autoprune.database.consumers import Consumer, Reader
from autoprune.database.drops import drop_order
from tests.database.test_factors import consumers, least_squares
from tests.families import FAMILIES
from tests.small import world


def error_of(found: Sequence[Consumer], kept: Sequence[int]) -> float:
    """The compensated error of keeping these atoms alone, over the consumers' energy."""
    total = 0.0
    for c in found:
        ridge = 1e-3 * c.second.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(c.second.shape[1])
        d = c.matrix - least_squares(c, torch.tensor(kept))
        total += float((torch.einsum("grc,gcd,grd->gr", d, c.second + ridge, d) * c.share).sum())
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_each_atom_that_goes_is_the_one_whose_loss_hurts_least(family: str) -> None:
    w = world(family)
    group = w.structure.groups[0]
    found = consumers(w, group.name)
    order, errors = drop_order(found, group.width)
    alive, lost = list(range(group.width)), 0.0
    assert len(set(order)) == group.width - 1
    for atom, error in zip(order[:5], errors, strict=False):
        after = {a: error_of(found, [b for b in alive if b != a]) for a in alive}
        assert after[atom] == pytest.approx(min(after.values()), rel=1e-6)
        lost += error
        assert after[atom] == pytest.approx(lost, rel=1e-6)
        alive.remove(atom)


def made_up(atoms: int, rows: int, kernel: tuple[int, ...], groups: int = 1) -> Consumer:
    generator = torch.Generator().manual_seed(0)
    block = int(torch.tensor(kernel).prod()) if kernel else 1
    n = atoms * block
    mix = torch.eye(n) + torch.randn(n, n, generator=generator) / n**0.5
    u = torch.randn(groups, 2 * n, n, generator=generator) @ mix
    reader = Reader("w", "conv", groups, kernel, 1, None, False, torch.arange(atoms)[:, None])
    matrix = torch.randn(groups, rows, n, generator=generator).double()
    share = torch.rand(groups, rows, generator=generator).double()
    second = (u.mT @ u).double() / u.shape[1]
    return Consumer(reader, torch.arange(atoms), matrix, second, u.mean(1).double(), share)


@pytest.mark.parametrize(("rows", "kernel", "groups"), [(12, (3, 3), 1), (200, (), 1), (7, (3,), 4)])
def test_waiting_removals_and_single_precision_give_the_order_of_drops_done_at_once(
    rows: int, kernel: tuple[int, ...], groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [made_up(40, rows, kernel, groups), made_up(40, 5, (), 1)]
    order, errors = drop_order(found, 40)
    monkeypatch.setattr("autoprune.database.drops.WAITING", 1)
    at_once, same = drop_order(found, 40)
    assert order == at_once
    assert errors == pytest.approx(same, rel=1e-8)
    monkeypatch.setattr("autoprune.database.drops.WAITING", 16)
    monkeypatch.setattr("autoprune.database.factors.SMALL", 0)
    rounded, close = drop_order(found, 40)
    assert rounded == order
    assert close == pytest.approx(errors, rel=1e-3)


def test_consumers_that_hold_some_atoms_each_are_summed_atom_by_atom() -> None:
    whole = made_up(10, 6, ())
    apart = whole.second.clone()
    apart[:, :5, 5:] = apart[:, 5:, :5] = 0.0  # nothing ties the halves together
    halves = [
        replace(
            whole,
            atoms=torch.arange(10)[part],
            matrix=whole.matrix[:, :, part],
            second=apart[:, part, part],
            mean=whole.mean[:, part],
        )
        for part in (slice(0, 5), slice(5, 10))
    ]
    scale = [float(h.second.diagonal(dim1=1, dim2=2).mean() / apart.diagonal(dim1=1, dim2=2).mean()) for h in halves]
    order, errors = drop_order([replace(whole, second=apart)], 10)
    parts, same = drop_order(halves, 10)
    if max(scale) / min(scale) < 1.5:  # the ridge follows the mean of each half
        assert order == parts
    assert errors == pytest.approx(same, rel=0.05)


def test_without_consumers_atoms_go_from_the_first() -> None:
    assert drop_order([], 4) == ([0, 1, 2], [0.0, 0.0, 0.0])
