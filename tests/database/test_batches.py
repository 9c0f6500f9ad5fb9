"""Batches as people have them: counted, cut, drawn and joined by samples, or left whole where there are none."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from autoprune.database.batches import Parts, Pool, chunks, drawing, gather, split_at
from autoprune.database.drawn import Drawn
from autoprune.database.rows import as_tensors, cut, kind, samples_of, size, take
from autoprune.errors import InputError

N = 6
X, Y = torch.arange(N * 4.0).view(N, 4), torch.arange(N)
GRAPH = (torch.randn(N, 5), torch.tensor([[0, 1, 2], [1, 2, 3]])), torch.arange(N)


def images(n: int, side: int = 8) -> list[Tensor]:
    return [torch.full((3, side, side), float(i)) for i in range(n)]


class Splits:
    """As much of a task as its calibration split."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def split(self, name: str) -> list[Any]:
        return self.batches


@pytest.mark.parametrize(
    ("batch", "n"),
    [
        ((X, Y), N),
        (X, N),
        ({"x": X, "labels": Y}, N),
        (((X, X[:, :2]), {"a": Y, "b": X}), N),
        ((X.repeat(8, 1), Y), N),
        ((X, Y.repeat_interleave(5)), N),
        ((X, {"boxes": [torch.zeros(i, 4) for i in range(N)], "labels": Y}), N),
        ((images(N), Y), N),
        ((images(3), Y[:3]), 3),
        ((images(N), [{"boxes": torch.zeros(i + 1, 4), "labels": Y[: i + 1]} for i in range(N)]), N),
        (({"x": X, "mask": torch.ones(1, 9)}, Y), N),
        ((X, [1, 2, 3, 4, 5, 6]), N),
        ((X[:2], Y[:2]), 2),
        ([X[:2], Y[:2]], 2),
        (GRAPH, None),
        ((torch.randn(7, 3, 5), torch.tensor([7, 4, 2])), None),
    ],
)
def test_samples_are_counted_wherever_they_lie(batch: Any, n: int | None) -> None:
    assert samples_of(batch) == n
    assert size(batch) == (n or 1)


def test_a_batch_without_a_tensor_is_named() -> None:
    with pytest.raises(InputError, match="it holds no tensor"):
        size({"text": "hello"})


def test_clips_are_cut_and_drawn_with_all_their_frames() -> None:
    frames = torch.arange(N * 8)[:, None]
    x, y = cut((frames, Y), 2, 4)
    assert x.flatten().tolist() == list(range(16, 32))
    assert y.tolist() == [2, 3]
    x, y = take((frames, Y), torch.tensor([5, 0]))
    assert x.flatten().tolist() == [*range(40, 48), *range(8)]
    assert y.tolist() == [5, 0]


def test_lists_of_images_are_cut_drawn_and_joined_by_image() -> None:
    batch = (images(N), Y)
    x, y = cut(batch, 4, 6)
    assert ([float(i.mean()) for i in x], y.tolist()) == ([4.0, 5.0], [4, 5])
    x, _ = take(batch, torch.tensor([3, 1]))
    assert [float(i.mean()) for i in x] == [3.0, 1.0]
    (whole,) = gather([batch, (images(3), Y[:3])], 8)
    assert len(whole[0]) == len(whole[1]) == 8


def test_what_all_samples_share_is_neither_cut_nor_repeated() -> None:
    mask = torch.ones(1, 9)
    (whole,) = gather([({"x": X, "mask": mask}, Y)] * 2, 9)
    assert whole[0]["x"].shape == (9, 4)
    assert torch.equal(cut(whole, 3, 5)[0]["mask"], mask)
    assert len(gather([({"x": X, "mask": mask * i}, Y) for i in (1, 2)], 12)) == 2, "other masks are not joined"


def test_a_batch_that_is_one_piece_stays_whole() -> None:
    assert cut(GRAPH, 0, 1) is GRAPH
    assert take(GRAPH, torch.tensor([0])) is GRAPH
    assert chunks(GRAPH, 2) == (GRAPH,)
    assert kind(GRAPH) is None
    assert len(gather([GRAPH] * 5, 3)) == 3


def test_batches_of_other_lengths_follow_each_other_and_of_equal_ones_become_one() -> None:
    first, second = torch.zeros(4, 7), torch.zeros(4, 9)
    assert [b.shape for b in gather([first, first, second, first], 13)] == [(8, 7), (4, 9), (1, 7)]
    one, two = split_at(gather([first, second], 8), 6)
    assert [b.shape for b in (*one, *two)] == [(4, 7), (2, 9), (2, 9)]


def test_a_last_smaller_batch_is_joined() -> None:
    (whole,) = gather([(X, Y), (X[:1], Y[:1])], 100)
    assert whole[1].tolist() == [*range(N), 0]


def test_parts_of_other_lengths_are_disjoint_and_complete_and_those_of_one_length_go_together() -> None:
    parts = Parts.of(Splits([torch.full((8, 5 + i), float(i)) for i in range(8)]), 64)  # type: ignore[arg-type]
    assert [p.samples for p in (parts.statistics, parts.fitness, parts.heldback)] == [16, 32, 16]
    assert [b.shape for b in parts.statistics] == [(8, 5), (8, 6)]
    batches = [torch.full((4, 5 + i % 2), float(i)) for i in range(16)]
    parts = Parts.of(Splits(batches), 64)  # type: ignore[arg-type]
    assert [b.shape for b in parts.statistics] == [(8, 5), (8, 6)]
    seen = [float(row[0]) for batch in parts.all() for row in batch]
    assert sorted(seen) == sorted([float(i) for i in range(16)] * 4)


def test_parts_of_batches_in_one_piece_hold_one_at_least_each() -> None:
    parts = Parts.of(Splits([GRAPH] * 3), 100)  # type: ignore[arg-type]
    assert torch.equal(parts.statistics[0][0][1], GRAPH[0][1])
    assert (len(parts.fitness), len(parts.heldback), parts.total) == (1, 1, 3)
    with pytest.raises(InputError, match="2 batches that cannot be cut into samples; at least 3"):
        Parts.of(Splits([GRAPH] * 2), 100)  # type: ignore[arg-type]


def test_a_pool_draws_from_each_of_its_batches() -> None:
    pool = Pool(Drawn((torch.zeros(3, 2), torch.ones(4, 5))))
    assert len(pool) == 7
    found = {number: (batch.shape, rows.tolist()) for number, batch, rows in pool.pieces(torch.tensor([6, 0, 3, 2]))}
    assert found == {0: ((2, 2), [0, 2]), 1: ((2, 5), [3, 0])}


def test_loaders_that_draw_at_random_draw_from_the_seed_and_leave_no_trace() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    torch.manual_seed(3)
    before = torch.get_rng_state()
    with drawing(5):
        first = draw()
    with drawing(5):
        assert draw() == first
    with drawing(6):
        assert draw() != first
    assert torch.equal(before, torch.get_rng_state())


def test_numpy_arrays_become_tensors_and_mappings_dicts() -> None:
    found = as_tensors(({"x": np.zeros((2, 3))}, [np.ones(2)]))
    assert found[0]["x"].shape == (2, 3)
    assert found[1][0].dtype == torch.float64
