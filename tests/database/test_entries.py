"""Entries are made once, kept as long as they fit, and shared through their folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from autoprune.database.entries import Entries

SIZE = 4000


class Maker:
    """Counts what it makes."""

    def __init__(self) -> None:
        self.made: list[float] = []

    def of(self, entries: Entries, value: float) -> Tensor:
        def make() -> dict[str, Tensor]:
            self.made.append(value)
            return {"weight": torch.full((SIZE // 4,), float(value))}

        return entries.get(f"e-{value:g}", make)["weight"]


def test_what_fits_is_made_once_and_what_was_used_last_stays() -> None:
    entries, maker = Entries(2 * SIZE), Maker()
    for value in (1, 2, 1, 3, 1, 2):
        assert bool((maker.of(entries, value) == value).all())
    assert maker.made == [1, 2, 3, 2]


def test_one_that_is_larger_than_the_limit_is_given_all_the_same(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        assert bool((Maker().of(Entries(10, folder), 5) == 5).all())
    assert list(tmp_path.iterdir()) == []


def test_processes_share_what_lies_in_the_folder_and_it_stays_below_the_limit(tmp_path: Path) -> None:
    limit = int(3.5 * SIZE)
    one, other, maker = Entries(limit, tmp_path), Entries(limit, tmp_path), Maker()
    held = maker.of(one, 1)
    assert torch.equal(maker.of(other, 1), held)
    assert maker.made == [1]
    for value in range(2, 9):
        maker.of(other, value)
        assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= limit
    assert not (tmp_path / "e-1.safetensors").exists()
    assert bool((held == 1).all()), "what is in use stays readable"


def test_a_broken_file_is_made_anew_and_a_folder_that_is_gone_costs_the_sharing_only(tmp_path: Path) -> None:
    maker = Maker()
    maker.of(Entries(10 * SIZE, tmp_path), 1)
    path = tmp_path / "e-1.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert bool((maker.of(Entries(10 * SIZE, tmp_path), 1) == 1).all())
    (tmp_path / "file").write_text("")
    assert bool((maker.of(Entries(10 * SIZE, tmp_path / "file" / "x"), 2) == 2).all())
    assert maker.made == [1, 1, 2]
