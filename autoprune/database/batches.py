"""The calibration data in its three parts; batches as trees of tensors joined, cut into batches, drawn, hashed."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autoprune.database.rows import as_tensors, cut, joined, kind, samples_of, size, take, tensors_of
from autoprune.errors import InputError
from autoprune.protocols import Batch, Direction, Task
from autoprune.tracing.outputs import faithful

__all__ = ["Parts", "Pool", "StatisticsOnly", "chunks", "cut", "digest", "drawing", "gather", "in_format"]
__all__ += ["prepare", "size", "split_at", "take"]

FEWEST, FEWEST_PIECES = 8, 3
"""Samples that a calibration split needs, and batches that cannot be cut."""


@dataclass(frozen=True)
class Parts:
    """Disjoint parts of the calibration split: a quarter for statistics, half for fitness, a quarter held back.

    `statistics` is one batch; the others are lists of batches. `layout` is the memory format of their 4-d tensors.
    """

    statistics: Batch
    fitness: tuple[Batch, ...]
    heldback: tuple[Batch, ...]
    total: int
    layout: torch.memory_format = torch.contiguous_format

    @staticmethod
    def of(task: Task, samples: int, batch_size: int = 256) -> Parts:
        """The first `samples` of the calibration split, cut in order; InputError where there are too few."""
        whole = gather(task.split("calibration"), samples)
        n, pieces = sum(map(size, whole)), any(samples_of(b) is None for b in whole)
        least = FEWEST_PIECES if pieces else FEWEST
        if n < least:
            what = "batches that cannot be cut into samples" if pieces else "samples"
            raise InputError(
                f"the calibration split has {n} {what}; at least {least} are needed (256 or more are advised)"
            )
        quarter = max(1, n // 4)
        statistics, rest = _statistics(whole, quarter)
        fitness, heldback = split_at(rest, n - size(statistics) - quarter)
        scored, held = ([c for b in part for c in chunks(b, batch_size)] for part in (fitness, heldback))
        return Parts(statistics, tuple(scored), tuple(held), n)

    def on(self, device: torch.device) -> Parts:
        """The same on `device`, in the format of `layout`."""
        return Parts(
            prepare(self.statistics, device, self.layout),
            tuple(prepare(b, device, self.layout) for b in self.fitness),
            tuple(prepare(b, device, self.layout) for b in self.heldback),
            self.total,
            self.layout,
        )


def _statistics(batches: Sequence[Batch], samples: int) -> tuple[Batch, tuple[Batch, ...]]:
    """The first samples as one batch, which a repair needs whole, and the others.

    Of batches that cannot be joined those of the kind with the most samples, and it is said where they are fewer.
    """
    kinds = [kind(b) for b in batches]
    totals = {k: sum(size(b) for b, other in zip(batches, kinds, strict=True) if other == k) for k in kinds if k}
    best = max(totals, key=lambda k: totals[k], default=None)
    alike = [i for i, k in enumerate(kinds) if k is not None and k == best] or [0]
    first, left = split_at([joined([batches[i] for i in alike])], samples)
    if size(first[0]) < samples:
        warnings.warn(
            f"calibration batches differ in shape: {size(first[0])} samples of one shape repair, not {samples}; "
            "batches that are padded alike, or larger ones, repair better",
            stacklevel=4,
        )
    return first[0], (*left, *(b for i, b in enumerate(batches) if i not in alike))


@dataclass(frozen=True)
class StatisticsOnly:
    """A task that shows its criterion the statistics part of the calibration split and nothing else."""

    task: Task
    statistics: Batch
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
        return chunks(self.statistics, self.batch_size)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return faithful(self.task, model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task.loss(model, batch)

    def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        return self.task.metrics(model, batches)


def chunks(batch: Batch, batch_size: int) -> tuple[Batch, ...]:
    """A batch cut into batches of `batch_size`; a rest below half of it joins the last, as small ones are noisy.

    One that is one piece stays as it is.
    """
    n = size(batch)
    starts = list(range(0, n, batch_size))
    if len(starts) > 1 and n - starts[-1] < batch_size / 2:
        starts.pop()
    return tuple(cut(batch, a, b) for a, b in zip(starts, [*starts[1:], n], strict=True))


def gather(batches: Iterable[Batch], samples: int) -> tuple[Batch, ...]:
    """The first `samples` samples of `batches`, joined into as few batches as their shapes allow; usually one.

    Batches of other lengths follow each other; one that is one piece counts as a sample.
    """
    runs: list[list[Batch]] = []
    n, before = 0, None
    for batch in batches:
        part = cut(as_tensors(batch), 0, samples - n)
        n += size(part)
        if before is not None and kind(part) == before:
            runs[-1].append(part)
        else:
            runs.append([part])
        before = kind(part)
        if n >= samples:
            break
    if not runs:
        raise InputError("a split of the task yields no batch")
    return tuple(joined(run) for run in runs)


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

    batches: tuple[Batch, ...]

    def __len__(self) -> int:
        return sum(map(size, self.batches))

    def pieces(self, index: Tensor) -> Iterator[tuple[int, Batch, Tensor]]:
        """The samples at `index` by the batch that holds them: its number, they as a batch, their places in it."""
        if len(self.batches) == 1:
            yield 0, take(self.batches[0], index), index
            return
        start = 0
        for number, batch in enumerate(self.batches):
            stop = start + size(batch)
            rows = index[(index >= start) & (index < stop)] - start
            if len(rows):
                yield number, take(batch, rows), rows
            start = stop


def in_format(model: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """`model` with its 4-d tensors in this memory format, in place; other tensors stay as they are."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=memory_format)
    return model


def prepare(batch: Batch, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> Batch:
    """A batch on `device`, its 4-d tensors in this memory format."""

    def move(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        t = t.to(device)
        return t.contiguous(memory_format=memory_format) if t.dim() == 4 else t

    return tree_map(move, batch)


def digest(batches: Iterable[Batch]) -> str:
    """A hash of all tensors of all batches."""
    h = hashlib.sha256()
    for leaf in (leaf for batch in batches for leaf in tensors_of(batch)):
        h.update(f"{tuple(leaf.shape)}{leaf.dtype}".encode())
        h.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return "sha256:" + h.hexdigest()
