"""The calibration data in its three parts; batches as trees of tensors joined, cut into batches, drawn, hashed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.database.drawn import Drawn, draw, prepare
from autoprune.database.rows import chunks, cut, joined, kind, samples_of, size, take, tensors_of
from autoprune.errors import InputError
from autoprune.protocols import Batch, Direction, Task
from autoprune.tracing.outputs import faithful

__all__ = ["Parts", "Pool", "StatisticsOnly", "bucketed", "chunks", "cut", "digest", "drawing", "gather", "in_format"]
__all__ += ["prepare", "size", "split_at", "take"]

FEWEST, FEWEST_PIECES = 8, 3
"""Samples that a calibration split needs, and batches that cannot be cut."""


@dataclass(frozen=True)
class Parts:
    """Disjoint parts of the calibration split: a quarter for statistics, half for fitness, a quarter held back.

    What repairs is fitted to all of `statistics` at once, however many batches these are; batches of other lengths are
    batches of their own. `fits` samples go through the model together where only memory decides, `trains` in training.
    `folder` is where the samples lie in files, if they do.
    """

    statistics: Drawn
    fitness: Drawn
    heldback: Drawn
    total: int
    layout: torch.memory_format = torch.contiguous_format
    fits: int = 1 << 30
    trains: int = 1 << 30
    validation: Drawn | None = None
    folder: Path | None = None

    @staticmethod
    def of(task: Task, samples: int, batch_size: int = 256) -> Parts:
        """The first `samples` of the calibration split, cut in order; InputError where there are too few."""
        return Parts.cut(draw(task.split("calibration"), samples), batch_size)

    @staticmethod
    def cut(whole: Drawn, batch_size: int = 256) -> Parts:
        """The parts of the calibration samples."""
        n, pieces = whole.samples, any(samples_of(b) is None for b in whole.raw)
        least = FEWEST_PIECES if pieces else FEWEST
        if n < least:
            what = "batches that cannot be cut into samples" if pieces else "samples"
            raise InputError(
                f"the calibration split has {n} {what}; at least {least} are needed (256 or more are advised)"
            )
        quarter = max(1, n // 4)
        statistics, rest = split_at(whole.raw, quarter)
        fitness, heldback = split_at(rest, n - 2 * quarter)
        return Parts(
            whole.of(bucketed(statistics)),
            whole.of(fitness).cut_to(batch_size),
            whole.of(heldback).cut_to(batch_size),
            n,
        )

    def on(self, device: torch.device) -> Parts:
        """The same on `device`, in the format of `layout`."""

        def moved(kept: Drawn) -> Drawn:
            return kept.on(device, self.layout)

        return replace(
            self,
            statistics=moved(self.statistics),
            fitness=moved(self.fitness),
            heldback=moved(self.heldback),
            validation=None if self.validation is None else moved(self.validation),
        )

    def all(self) -> Iterator[Batch]:
        """Every batch, statistics first."""
        yield from self.statistics
        yield from self.fitness
        yield from self.heldback


@dataclass(frozen=True)
class StatisticsOnly:
    """A task that shows its criterion the statistics part of the calibration split and nothing else."""

    task: Task
    statistics: Drawn
    batch_size: int = 256

    @property
    def directions(self) -> Mapping[str, Direction]:
        return self.task.directions

    def build(self) -> nn.Module:
        return self.task.build()

    def example_inputs(self) -> tuple[Tensor, ...]:
        return self.task.example_inputs()

    def split(self, name: str) -> Iterable[Batch]:
        if name != "calibration":
            raise InputError(f"a criterion may read the calibration split only, not {name!r}")
        return self.statistics.cut_to(self.batch_size)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return faithful(self.task, model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task.loss(model, batch)

    def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        return self.task.metrics(model, batches)


def gather(batches: Iterable[Batch], samples: int) -> tuple[Batch, ...]:
    """The first `samples` samples of `batches`, joined into as few batches as their shapes allow; usually one.

    Batches of other lengths follow each other; one that is one piece counts as a sample.
    """
    return tuple(draw(batches, samples))


def bucketed(batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """Batches of one length joined, in the order of the first of each; those that are one piece stay alone."""
    if len(batches) == 1:
        return tuple(batches)
    buckets: dict[object, list[Batch]] = {}
    for i, batch in enumerate(batches):
        alike = kind(batch)
        buckets.setdefault(i if alike is None else alike, []).append(batch)
    return tuple(joined(bucket) for bucket in buckets.values())


def split_at(batches: Sequence[Batch], samples: int) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """The first `samples` samples of `batches`, and the others."""
    first: list[Batch] = []
    rest: list[Batch] = []
    for batch in batches:
        n = size(batch)
        inside = min(n, samples)
        first += [cut(batch, 0, inside)] if inside else []
        rest += [cut(batch, inside, n)] if inside < n else []
        samples -= inside
    return tuple(first), tuple(rest)


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Inside, loaders that shuffle and augment draw from `seed`; the global generators come back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@dataclass(frozen=True)
class Pool:
    """Samples to draw from: batches that could not be joined, each with samples of its own."""

    batches: Drawn

    def __len__(self) -> int:
        return self.batches.samples

    def pieces(self, index: Tensor) -> Iterator[tuple[int, Batch, Tensor]]:
        """The samples at `index` by the batch that holds them: its number, they as a batch, their places in it."""
        start = 0
        for number, n in enumerate(self.batches.sizes):
            rows = index if len(self.batches) == 1 else index[(index >= start) & (index < start + n)] - start
            if len(rows):
                yield number, self.batches.taken(number, rows), rows
            start += n


def in_format(model: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """`model` with its 4-d tensors in this memory format, in place; other tensors stay as they are."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=memory_format)
    return model


def digest(batches: Iterable[Batch]) -> str:
    """A hash of all tensors of all batches."""
    h = hashlib.sha256()
    for leaf in (leaf for batch in batches for leaf in tensors_of(batch)):
        h.update(f"{tuple(leaf.shape)}{leaf.dtype}".encode())
        for part in leaf.detach().split(64) if leaf.dim() else (leaf.detach(),):
            h.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return "sha256:" + h.hexdigest()
