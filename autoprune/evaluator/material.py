"""What a fine-tune learns from, step by step: training samples with the dense outputs, kept or read as it goes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count as counted
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.database.batches import Pool, bucketed, chunks, drawing
from autoprune.database.drawn import Drawn, TooMuchError, bytes_of, draw, prepare
from autoprune.database.rows import as_tensors, size, take_rows, tensors_of
from autoprune.errors import InputError
from autoprune.evaluator.features import noted
from autoprune.evaluator.precision import Precision, computing
from autoprune.protocols import Batch, Task
from autoprune.tracing.outputs import faithful

BATCH_SIZE = 128
MOST = 1 << 30
"""Bytes of training samples, as they are kept, and of dense outputs up to which they stay in memory."""
SHUFFLED, SHUFFLED_BYTES = 8 * BATCH_SIZE, 256 << 20
"""Samples that are mixed where they are read as it goes, unless they are larger than this together."""


@dataclass(frozen=True)
class Portion:
    """Samples that go through together, the dense outputs for them, and their share of the step's samples.

    `features` are what modules of the dense model gave for them, where they were asked for.
    """

    batch: Batch
    teacher: Tensor
    share: float
    features: tuple[Tensor, ...] = ()


Step = tuple[int, Iterable[Portion]]
"""How many samples a step has, and they."""


@dataclass(frozen=True)
class Reading:
    """How a train split is read: samples of a step, of the dense model at a time, and in which precision that runs.

    A `fresh` one is read anew at every epoch, whatever it seems to give; so it is where `features`, modules of the
    dense model by their names, are taught too, whose outputs nobody keeps.
    """

    batch_size: int = BATCH_SIZE
    at_once: int = BATCH_SIZE
    precision: Precision = "fp32"
    fresh: bool = False
    features: tuple[str, ...] = ()


class Material(Protocol):
    """Where a course takes its steps from.

    `begun` tells by the seed which epoch was begun last, and at which step: who goes on behind it reads from there.
    """

    @property
    def begun(self) -> dict[int, tuple[int, int]]:
        """Seed -> (epoch, its first step)."""

    @property
    def device(self) -> torch.device:
        """Where the batches lie."""

    def steps(self, start: int, stop: int, seed: int, at_once: int) -> Iterator[Step]:
        """Steps [start, stop), always the same ones for a seed, in portions of about `at_once` samples."""


@dataclass(frozen=True)
class Repeated:
    """Samples that are kept, with their dense outputs: whole batches of one random order after the other."""

    samples: Pool
    teacher: tuple[Tensor, ...]
    batch_size: int = BATCH_SIZE
    begun: dict[int, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        return self.teacher[0].device

    def steps(self, start: int, stop: int, seed: int, at_once: int) -> Iterator[Step]:
        for index in islice(_orders(len(self.samples), stop, seed, self.batch_size), start, None):
            yield len(index), self._portions(index, at_once)

    def _portions(self, index: Tensor, at_once: int) -> Iterator[Portion]:
        for part in index.split(at_once):
            for number, batch, rows in self.samples.pieces(part):
                teacher = self.teacher[number]
                rows = rows.to(teacher.device)
                right = take_rows(teacher, rows, len(teacher) // self.samples.batches.sizes[number])
                yield Portion(batch, right, len(rows) / len(index))


@dataclass(frozen=True)
class Streamed:
    """The train split read as it goes, epoch after epoch, and the dense model asked for each portion.

    What a loader shuffles or augments follows from the seed and the epoch; samples are mixed among those that are at
    hand. A rest that makes no whole batch is left out of its epoch. `features` are modules of the dense model whose
    outputs are noted.
    """

    task: Task
    dense: nn.Module
    device: torch.device
    layout: torch.memory_format
    precision: Precision = "fp32"
    batch_size: int = BATCH_SIZE
    features: tuple[str, ...] = ()
    begun: dict[int, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)

    def steps(self, start: int, stop: int, seed: int, at_once: int) -> Iterator[Step]:
        ready = getattr(self.task.split("train"), "ready", None)
        epoch, first = self.begun.get(seed, (0, 0))
        if first > start:
            epoch, first = 0, 0
        for number, pieces in islice(self._read(seed, epoch, first), start - first, stop - first):
            own = None if ready is None else _own_ready(ready, seed, number)
            total = sum(map(size, pieces))
            yield total, self._portions(pieces, total, at_once, own)

    def _portions(
        self, pieces: Sequence[Batch], total: int, at_once: int, ready: Callable[[Batch], Batch] | None
    ) -> Iterator[Portion]:
        for part in (part for piece in pieces for part in chunks(piece, at_once)):
            batch = prepare(part if ready is None else ready(part), self.device, self.layout)
            with torch.no_grad(), computing(self.dense, self.precision), noted(self.dense, self.features) as seen:
                teacher = faithful(self.task, self.dense, batch)
            yield Portion(batch, teacher, size(batch) / total, tuple(seen()))

    def _read(self, seed: int, epoch: int, step: int) -> Iterator[tuple[int, list[Batch]]]:
        """Numbered steps without end, from the first one of an epoch on."""
        for number in counted(epoch):
            self.begun[seed] = number, step
            chance = torch.Generator().manual_seed(seed + 1_000_003 * number)
            own = int(torch.randint(2**31, (), generator=chance))
            for pieces in _mixed(_Aside(partial(_source, self.task, own), own), chance, self.batch_size):
                yield step, pieces
                step += 1


def material_for(
    task: Task,
    dense: nn.Module,
    steps: int,
    seed: int,
    layout: torch.memory_format,
    reading: Reading | None = None,
) -> Material:
    """What a course of `steps` learns from.

    Where the train split gives the same samples at each pass, and they and their dense outputs are few enough, the
    first ones, as many as `steps` can use, are kept. Else the split is read as it goes.
    """
    r = reading or Reading()
    device = next((p.device for p in dense.parameters()), torch.device("cpu"))
    if not (r.fresh or r.features) and _repeats(task, seed):
        try:
            with drawing(seed):
                samples = draw(task.split("train"), steps * r.batch_size, most=MOST).on(device, layout)
            return Repeated(Pool(samples), _taught(task, dense, samples, r.at_once, r.precision), r.batch_size)
        except TooMuchError:
            pass
    return Streamed(task, dense, device, layout, r.precision, r.batch_size, r.features)


def _taught(task: Task, dense: nn.Module, samples: Drawn, at_once: int, precision: Precision) -> tuple[Tensor, ...]:
    """The dense outputs for each batch of `samples`."""
    taught, held = [], 0
    with torch.no_grad(), computing(dense, precision):
        for i in range(len(samples)):
            parts = []
            for batch in samples[i : i + 1].cut_to(at_once):
                parts.append(faithful(task, dense, batch))
                held += parts[-1].numel() * parts[-1].element_size()
                if held > MOST:
                    raise TooMuchError
            taught.append(torch.cat(parts))
    return tuple(taught)


def _repeats(task: Task, seed: int) -> bool:
    """Whether the train split's first batch is the same whatever chance has it."""
    first = []
    for chance in (seed, seed + 1):
        with drawing(chance):
            batch = next(iter(task.split("train")), None)
        if batch is None:
            raise InputError("the train split of the task yields no batch")
        first.append(tensors_of(as_tensors(batch)))
    one, other = first
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _source(task: Task, seed: int) -> Iterator[Batch]:
    """The train split's batches as they are kept; a generator that a loader has for itself starts from the seed."""
    split: Any = task.split("train")
    loader = getattr(split, "loader", split)
    for owner in (loader, getattr(loader, "sampler", None)):
        own = getattr(owner, "generator", None)
        if isinstance(own, torch.Generator):
            own.manual_seed(seed)
    stored = getattr(split, "stored", None)
    return map(as_tensors, split if stored is None else stored())


def _own_ready(ready: Callable[[Batch], Batch], seed: int, step: int) -> Callable[[Batch], Batch]:
    """`ready`, whatever it draws: from the seed and the step, and nobody else's chance."""

    def made(batch: Batch) -> Batch:
        with drawing((seed * 1_000_003 + step) % 2**31):
            return ready(batch)

    return made


def _mixed(batches: Iterable[Batch], chance: torch.Generator, batch_size: int) -> Iterator[list[Batch]]:
    """Steps of an epoch: samples drawn from those at hand, by the batch of one length that they were in."""
    held: list[Batch] = []
    given = False
    for batch in batches:
        held.append(batch)
        if _enough(held, batch_size):
            pool, order = _shuffled(held, chance)
            whole = len(order) // batch_size * batch_size
            yield from (_pieces(pool, index) for index in order[:whole].split(batch_size))
            held, given = _pieces(pool, order[whole:]), True
    if held:
        pool, order = _shuffled(held, chance)
        whole = len(order) // batch_size * batch_size
        rest = order[: whole or (0 if given else len(order))]
        yield from (_pieces(pool, index) for index in rest.split(batch_size) if len(index))


def _enough(held: Sequence[Batch], batch_size: int) -> bool:
    n = sum(map(size, held))
    return n >= batch_size and (n >= SHUFFLED or bytes_of(held) >= SHUFFLED_BYTES)


def _shuffled(held: Sequence[Batch], chance: torch.Generator) -> tuple[Pool, Tensor]:
    pool = Pool(Drawn(bucketed(held)))
    return pool, torch.randperm(len(pool), generator=chance)


def _pieces(pool: Pool, index: Tensor) -> list[Batch]:
    return [batch for _, batch, _ in pool.pieces(index)] if len(index) else []


class _Aside:
    """What an iterator yields that draws from the global generators: in here from states of their own."""

    def __init__(self, make: Callable[[], Iterator[Batch]], seed: int) -> None:
        with drawing(seed):
            self._source = make()
            self._states = _states()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        with self._own():
            return next(self._source)

    @contextmanager
    def _own(self) -> Iterator[None]:
        before = _states()
        _restore(self._states)
        try:
            yield
        finally:
            self._states = _states()
            _restore(before)


def _states() -> tuple[Any, Any, Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _restore(states: tuple[Any, Any, Tensor]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def _orders(samples: int, steps: int, seed: int, batch_size: int) -> Iterator[Tensor]:
    """Indices of each step's batch: whole batches of one random order after the other."""
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < min(batch_size, samples):
            order = torch.randperm(samples, generator=generator)
        yield order[:batch_size]
        order = order[batch_size:]
