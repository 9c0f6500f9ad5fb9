"""The calibration data in its three parts, and batches as trees of tensors: join, cut, count, hash, move."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoprune.errors import InputError
from autoprune.protocols import Batch, Direction, Task


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
        """The first `samples` of the calibration split, cut in order; InputError where there are fewer than 8."""
        whole = gather(task.split("calibration"), samples)
        n = size(whole)
        if n < 8:
            raise InputError(f"the calibration split has {n} samples; at least 8 are needed (256 or more are advised)")
        quarter = n // 4
        fitness, heldback = cut(whole, quarter, n - quarter), cut(whole, n - quarter, n)
        return Parts(cut(whole, 0, quarter), chunks(fitness, batch_size), chunks(heldback, batch_size), n)

    def on(self, device: torch.device) -> Parts:
        """The same on `device`, in the format of `layout`."""
        return Parts(
            prepare(self.statistics, device, self.layout),
            tuple(prepare(b, device, self.layout) for b in self.fitness),
            tuple(prepare(b, device, self.layout) for b in self.heldback),
            self.total,
            self.layout,
        )


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
        return self.task.outputs(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task.loss(model, batch)

    def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        return self.task.metrics(model, batches)


def size(batch: Batch) -> int:
    """Samples in a batch: dimension 0 of its first tensor."""
    leaves = [t for t in tree_leaves(batch) if isinstance(t, Tensor)]
    if not leaves:
        raise InputError("a batch must be a tree of tensors with the samples in dimension 0; it holds no tensor")
    return len(leaves[0])


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Samples [start, stop) of a batch, as views."""
    return tree_map(lambda t: t[start:stop] if isinstance(t, Tensor) else t, batch)


def take(batch: Batch, index: Tensor) -> Batch:
    """The samples at `index`."""
    return tree_map(lambda t: t[index] if isinstance(t, Tensor) else t, batch)


def chunks(batch: Batch, batch_size: int) -> tuple[Batch, ...]:
    """A batch cut into batches of `batch_size`; a rest below half of it joins the last, as small ones are noisy."""
    n = size(batch)
    starts = list(range(0, n, batch_size))
    if len(starts) > 1 and n - starts[-1] < batch_size / 2:
        starts.pop()
    return tuple(cut(batch, a, b) for a, b in zip(starts, [*starts[1:], n], strict=True))


def gather(batches: Iterable[Batch], samples: int) -> Batch:
    """The first `samples` samples of `batches` joined into one batch; fewer where there are no more."""
    parts, n = [], 0
    for batch in batches:
        parts.append(cut(batch, 0, samples - n))
        n += size(parts[-1])
        if n >= samples:
            break
    if not parts:
        raise InputError("a split of the task yields no batch")
    flat = [tree_leaves(p) for p in parts]
    joined = iter([torch.cat(ts) if isinstance(ts[0], Tensor) else ts[0] for ts in zip(*flat, strict=True)])
    return tree_map(lambda _: next(joined), parts[0])


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
    for leaf in _tensors(batches):
        h.update(f"{tuple(leaf.shape)}{leaf.dtype}".encode())
        h.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return "sha256:" + h.hexdigest()


def _tensors(batches: Iterable[Batch]) -> Iterator[Tensor]:
    for batch in batches:
        yield from (t for t in tree_leaves(batch) if isinstance(t, Tensor))
