"""Samples as they were drawn: in memory or in files, in the type that they came in, made ready at use."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autoprune.database import drawn
from autoprune.database.drawn import Drawn, draw, opened, total
from autoprune.errors import InputError

N = 20


def halved(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0].float() / 2, batch[1]


class Bytes:
    """A split that says how it should be kept."""

    ready = staticmethod(halved)

    def __init__(self) -> None:
        self.x = torch.arange(N * 12).view(N, 3, 2, 2).to(torch.uint8)

    def stored(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.x.split(6), torch.arange(N).split(6), strict=True)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(halved, self.stored())


def values(kept: Drawn) -> list[float]:
    return torch.cat([batch[0].flatten() for batch in kept]).tolist()


def test_what_is_kept_is_of_the_stored_type_and_what_is_asked_for_is_ready() -> None:
    split = Bytes()
    kept = draw(split, 17)
    assert (kept.raw[0][0].dtype, kept.sizes, kept.samples) == (torch.uint8, (17,), 17)
    assert torch.equal(kept[0][0], split.x[:17].float() / 2)
    assert kept[0] is kept[0], "small ones are made ready once"
    assert values(kept.cut_to(4)) == values(kept)
    assert kept.cut_to(4).sizes == (4, 4, 4, 5)
    assert torch.equal(kept.cut_to(4).first(10)[2][0], kept[0][0][8:10])
    assert (total(kept), total(list(kept))) == (17, 17)


def test_layout_and_device_are_those_asked_for_at_use() -> None:
    kept = draw(Bytes(), N).on(torch.device("cpu"), torch.channels_last)
    assert kept[0][0].is_contiguous(memory_format=torch.channels_last)


def test_many_samples_lie_in_files_that_another_process_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, here = Bytes(), draw(Bytes(), 17)
    monkeypatch.setattr(drawn, "SMALL", 100)
    kept = draw(split, 17, tmp_path / "calibration")
    there = opened(split, tmp_path / "calibration")
    assert there is not None
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.bin")) == 17 * (12 + 8)
    for found in (kept, there, pickle.loads(pickle.dumps(there))):
        assert not found.is_small
        assert found[0] is not found[0], "many are made ready at each use"
        assert values(found) == values(here)
        assert found[0][1].tolist() == list(range(17))
    assert values(there.cut_to(5).first(12)) == values(here)[: 12 * 12]


def test_batches_of_other_lengths_and_trees_come_back_from_their_files_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawn, "SMALL", 0)
    batches: list[Any] = [({"ids": torch.full((4, n), n), "mask": torch.ones(4, n, dtype=torch.bool)}, torch.arange(4))
                          for n in (5, 5, 7)]  # fmt: skip
    draw(batches, 11, tmp_path)
    found = opened(batches, tmp_path)
    assert found is not None
    assert [tuple(b[0]["ids"].shape) for b in found] == [(8, 5), (3, 7)]
    assert [b[0]["mask"].dtype for b in found] == [torch.bool] * 2
    assert found[1][0]["ids"].unique().tolist() == [7]


def test_what_cannot_lie_in_files_stays_in_memory_and_few_samples_make_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(Bytes(), N, tmp_path / "few")
    assert opened(Bytes(), tmp_path / "few") is None
    monkeypatch.setattr(drawn, "SMALL", 0)
    listed = [([torch.zeros(3, 4 + i, 4) for i in range(5)], torch.arange(5))] * 2
    assert draw(listed, 8, tmp_path / "listed").samples == 8
    assert opened(listed, tmp_path / "listed") is None


def test_a_split_without_a_batch_is_told() -> None:
    with pytest.raises(InputError, match="yields no batch"):
        draw([], 3)
