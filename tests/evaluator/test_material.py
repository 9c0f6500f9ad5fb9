"""What a fine-tune learns from: kept where the train split repeats and is small, else read as it goes."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from autoprune.database.drawn import samples_in
from autoprune.evaluator import material
from autoprune.evaluator.material import BATCH_SIZE, Material, Reading, Repeated, Streamed, material_for
from autoprune.tasks._wrap import Pairs
from tests.small import RandomTask, World, world

N = 300


@dataclass(frozen=True)
class Learning(RandomTask):
    """With a train split of its own."""

    train: Any = None

    def split(self, name: str) -> Iterable[Any]:
        return self.train if name == "train" else super().split(name)


class Split:
    """Numbered samples in batches of 25; each pass shifts them by chance, counts, and looks at all generators."""

    def __init__(self, shape: tuple[int, ...], augments: bool) -> None:
        self.x, self.augments, self.read = torch.zeros(N, *shape), augments, 0
        self.x.view(N, -1)[:, 0] = torch.arange(N)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i, x in enumerate(self.x.split(25)):
            self.read += len(x)
            shift = 0.1 * (random.random() + np.random.rand() + torch.rand(()).item()) if self.augments else 0.0
            yield x + shift, torch.arange(25 * i, 25 * i + len(x))


def made(w: World, split: Any, steps: int = 10, reading: Reading | None = None) -> Material:
    task = Learning(w.task.model, w.task.shape, train=split)
    return material_for(task, w.model, steps, 3, torch.channels_last, reading)


def taken(found: Material, start: int, stop: int, at_once: int = BATCH_SIZE) -> list[list[int]]:
    """The numbers of the samples of each step."""
    rows = []
    for n, portions in found.steps(start, stop, 3, at_once):
        held = list(portions)
        assert sum(p.share for p in held) == pytest.approx(1.0)
        rows.append([int(i) for p in held for i in p.batch[1]])
        assert len(rows[-1]) == n
    return rows


def test_a_small_split_that_repeats_is_kept_and_any_other_is_read_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    w = world("plain")
    assert isinstance(made(w, Split(w.task.shape, augments=False)), Repeated)
    assert isinstance(made(w, Split(w.task.shape, augments=True)), Streamed)
    monkeypatch.setattr(material, "MOST", 1000)
    large = Split(w.task.shape, augments=False)
    assert isinstance(made(w, large), Streamed)
    assert large.read <= 75, "no more than it takes to see that"


@pytest.mark.parametrize("augments", [True, False])
def test_an_epoch_takes_whole_batches_of_all_samples_in_another_order_each_time(
    augments: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world("plain")
    monkeypatch.setattr(material, "MOST", 0)
    found = made(w, Split(w.task.shape, augments))
    first, again = taken(found, 0, 4), taken(found, 0, 4)
    assert first == again
    for epoch in (first[:2], first[2:]):
        numbers = [i for row in epoch for i in row]
        assert len(numbers) == len(set(numbers)) == 2 * BATCH_SIZE
    assert first[:2] != first[2:]
    assert [sorted(row) for row in taken(found, 1, 4, at_once=40)] == [sorted(row) for row in first[1:]]


def test_few_samples_are_mixed_at_a_time_and_none_is_lost_between(monkeypatch: pytest.MonkeyPatch) -> None:
    w = world("plain")
    monkeypatch.setattr(material, "SHUFFLED", 150)
    found = made(w, Split(w.task.shape, augments=True))
    one, other = taken(found, 0, 2)
    assert max(one) < 150
    assert len({*one, *other}) == 2 * BATCH_SIZE


def test_the_dense_outputs_are_those_for_the_very_samples_and_global_chance_stays() -> None:
    w = world("plain")
    found = made(w, Split(w.task.shape, augments=True))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    seen = []
    for _, portions in found.steps(0, 3, 3, BATCH_SIZE):
        for p in portions:
            with torch.no_grad():
                torch.testing.assert_close(p.teacher, w.model(p.batch[0]))
            seen.append(p.batch[0])
        torch.rand(3)  # what others draw in between changes nothing
        random.random()
    torch.set_rng_state(before[2])
    random.setstate(before[0])
    again = [p.batch[0] for _, portions in found.steps(0, 3, 3, BATCH_SIZE) for p in portions]
    assert all(torch.equal(a, b) for a, b in zip(seen, again, strict=True))
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_loader_with_a_generator_of_its_own_gives_the_same_at_each_pass() -> None:
    w = world("plain")
    data = TensorDataset(torch.randn(N, *w.task.shape), torch.arange(N))
    loader = DataLoader(data, 25, shuffle=True, generator=torch.Generator().manual_seed(7))
    found = made(w, Pairs(loader, spread=False))
    assert isinstance(found, Streamed)
    assert taken(found, 0, 3) == taken(found, 0, 3)


def test_batches_of_other_lengths_share_a_step() -> None:
    w = world("plain")
    batches = [(torch.randn(20, *w.task.shape), torch.arange(20 * i, 20 * i + 20)) for i in range(8)]
    odd = [({"x": x} if i % 2 else x, y) for i, (x, y) in enumerate(batches)]

    class Odd(Learning):
        def outputs(self, model: Any, batch: Any) -> Tensor:
            x = batch[0]
            return super().outputs(model, (x["x"] if isinstance(x, dict) else x, batch[1]))

    task = Odd(w.task.model, w.task.shape, train=odd)
    found = Streamed(task, w.model, torch.device("cpu"), torch.contiguous_format)
    ((n, portions),) = found.steps(0, 1, 0, BATCH_SIZE)
    kinds = [type(p.batch[0]) for p in portions]
    assert (n, set(kinds)) == (BATCH_SIZE, {dict, torch.Tensor})


def test_a_split_of_less_than_a_batch_is_an_epoch_of_one_step() -> None:
    w = world("plain")
    split = Split(w.task.shape, augments=True)
    split.x = split.x[:60]
    assert [len(row) for row in taken(made(w, split), 0, 3)] == [60] * 3


@pytest.mark.parametrize(("drop", "n"), [(False, 103), (True, 100)])
def test_samples_are_counted_without_a_pass_where_the_loader_knows(drop: bool, n: int) -> None:
    data = TensorDataset(torch.zeros(103, 2), torch.zeros(103))
    assert samples_in(Pairs(DataLoader(data, 25, drop_last=drop), spread=False)) == n
    assert samples_in(list(DataLoader(data, 25, drop_last=drop))) == n
    assert samples_in(Pairs([(torch.zeros(4, 2), torch.zeros(4))] * 3, spread=False)) == 12


def test_a_kept_split_is_learnt_in_the_order_of_its_seed() -> None:
    w = world("plain")
    found = made(w, Split(w.task.shape, augments=False))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3)).tolist()
    assert taken(found, 0, 2) == [order[:128], order[128:256]]
    assert isinstance(found, Repeated)
    assert taken(replace(found), 1, 2) == [order[128:256]]


def test_a_split_that_repeats_is_read_anew_at_every_epoch_where_it_must_be_or_features_are_taught() -> None:
    w = world("plain")
    split = Split(w.task.shape, augments=False)
    name, module = next((n, m) for n, m in w.model.named_modules() if isinstance(m, torch.nn.Conv2d))
    for reading in (Reading(fresh=True), Reading(features=(name,))):
        found = made(w, split, reading=reading)
        assert isinstance(found, Streamed)
        split.read = 0
        taken(found, 0, 4)
        assert split.read == 2 * N, "two epochs of two steps"
    ((_, portions),) = found.steps(0, 1, 3, BATCH_SIZE)
    for portion in portions:
        with torch.no_grad():
            torch.testing.assert_close(portion.features[0], module(portion.batch[0]))


@pytest.mark.parametrize("augments", [True, False])
def test_a_step_has_as_many_samples_as_asked_for(augments: bool) -> None:
    w = world("plain")
    found = made(w, Split(w.task.shape, augments), reading=Reading(batch_size=60))
    rows = taken(found, 0, 7)
    assert [len(row) for row in rows] == [60] * 7
    assert len({i for row in rows[:5] for i in row}) == N


def test_who_goes_on_reads_from_the_epoch_that_was_begun() -> None:
    w = world("plain")
    split = Split(w.task.shape, augments=True)
    first = made(w, split)
    whole = taken(first, 0, 7)
    again = made(w, split)
    again.begun[3] = first.begun[3]
    assert first.begun[3] == (3, 6)
    split.read = 0
    assert taken(again, 6, 7) == whole[6:]
    assert split.read == N
    assert taken(again, 1, 3) == whole[1:3], "what lies before it is found from the start"


class Noisy(Split):
    """Kept as it is, and shifted by chance when it is made ready."""

    def stored(self) -> Iterator[tuple[Tensor, Tensor]]:
        return super().__iter__()

    def ready(self, batch: Any) -> Any:
        return batch[0] + 0.1 * (random.random() + np.random.rand() + torch.rand(()).item()), batch[1]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.ready, self.stored())


def test_what_is_drawn_as_a_batch_is_made_ready_follows_from_the_seed_too() -> None:
    w = world("plain")
    found, split = made(w, Noisy(w.task.shape, augments=False)), Noisy(w.task.shape, augments=False)
    assert isinstance(found, Streamed)
    first = [p.batch[0].sum() for _, ps in found.steps(0, 3, 3, BATCH_SIZE) for p in ps]
    random.random()
    torch.rand(3)
    again = [p.batch[0].sum() for _, ps in made(w, split).steps(0, 3, 3, BATCH_SIZE) for p in ps]
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert first[0] != first[2]
