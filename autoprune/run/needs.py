"""What a search will need: memory of its driver and of each worker, disk of the database; how many workers fit."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from autoprune.database.build import GRAM_SHARE
from autoprune.database.consumers import LARGEST
from autoprune.database.factors import SMALL
from autoprune.errors import InputError
from autoprune.evaluator.settings import Settings
from autoprune.files.machine import free_memory, own_memory, size
from autoprune.matrices import WEIGHT
from autoprune.protocols import Criterion, GramCriterion
from autoprune.structure import Structure

SHARE = 0.9
"""Of the free memory, for us."""
EVERY_S = 0.01
COPIES = 3
"""Of the model that a process holds: dense, slim, and one under work."""
DROPS = 4
"""Of the largest Gram that its drops hold."""
HELD = 128 << 20
"""Bytes of samples that are held at most; of more the files are mapped."""
ENTRY = 8
"""Bytes of a number in a Gram."""


@dataclass(frozen=True)
class Needs:
    """Bytes; `worker` is what one worker holds for itself alone, None where nobody has measured it.

    `driver` is at most what this process holds, `shared` what all workers map together, `disk` the level database.
    """

    driver: int
    worker: int | None
    shared: int
    disk: int
    free: int

    def workers(self, asked: int | None, most: int) -> int:
        """The workers that were asked for, or where nobody asked as many as fit, up to `most`."""
        if asked is not None or self.worker is None:
            return most if asked is None else asked
        return max(1, min(most, int((SHARE * self.free - self.driver - self.shared) / max(self.worker, 1))))

    def check(self, advice: str) -> None:
        """InputError where not even one worker fits."""
        need = self.driver + (self.worker or 0)
        if need > self.free:
            raise InputError(f"{_short(need, self.free)} for this process and one worker; {advice}")

    def said(self, workers: int) -> str:
        """One line on `workers` workers."""
        if self.worker is None:
            each = f"{workers} workers of a size that this system does not tell"
        else:
            each = f"{workers} worker{'s' * (workers != 1)} of {size(self.worker)} each"
        return (
            f"needs about {size(self.driver)} of memory for this process, {each} and {size(self.shared)} that they "
            f"share ({size(self.free)} are free); the level database takes {size(self.disk)} of disk"
        )

    def facts(self, workers: int) -> dict[str, Any]:
        """Plain values for log.jsonl."""
        return {**asdict(self), "workers": workers}


def with_grams(structure: Structure, criterion: Criterion) -> Structure:
    """The groups whose Grams are collected: masks by a criterion that scores single weights want none."""
    if isinstance(criterion, GramCriterion):
        return structure
    return replace(structure, groups=tuple(g for g in structure if g.kind != WEIGHT))


def check_room(structure: Structure, inputs: Any, settings: Settings) -> None:
    """That what must lie in memory whatever happens fits in: the data, the model, the Grams of the widest layers.

    Raises:
        InputError: it does not, with what to lower.
    """
    columns, free = gram_columns(structure), free_memory()
    most = max((n * n for n in columns.values()), default=0)
    held = min(ENTRY * sum(n * n for n in columns.values()), max(free // GRAM_SHARE, ENTRY * most))
    grams = held + ENTRY * DROPS * most
    model = COPIES * sum(math.prod(t.shape) * t.itemsize for op in structure.ops for t in op.tensors)
    samples = min(HELD, (settings.calibration + settings.validation) * _sample_bytes(inputs))
    need = own_memory() + grams + model + samples
    if need > free:
        widest = max(columns, key=lambda name: columns[name], default="")
        parts = f"{size(samples)} for samples, {size(grams)} for the statistics of what groups feed"
        raise InputError(
            f"{_short(need, free)} at the least ({parts}): lower evaluator.calibration and evaluator.validation, or "
            f"leave out the groups that the widest layer reads ({widest.removesuffix('.weight')}) by space.exclude"
        )


def database_bytes(structure: Structure) -> int:
    """About what the level database takes on disk: a triangular factor of every consumer, stored whole.

    And the scores of all weights where their zeros are searched.
    """
    scores = 4 * sum(g.width for g in structure if g.kind == WEIGHT)
    return scores + sum(n * n * (4 if n > SMALL else 8) for n in gram_columns(structure).values())


def entry_bytes(structure: Structure) -> int:
    """What the compensated weights of all widths would take together."""
    shapes = {t.name: t.shape for op in structure.ops for t in op.tensors}
    total = 0.0
    for group in (g for g in structure if g.narrows):
        read = {s.tensor for s in group.slices if s.role == "consume" and s.tensor in shapes}
        total += sum(math.prod(shapes[name]) for name in read) * 4 * sum(w / group.width for w in group.grid)
    rounded = (name for group in structure if group.kind != WEIGHT for name in group.matrices)
    total += sum(math.prod(shapes[name]) for name in rounded)  # a byte a number
    # a bit for each weight and the values that stay, of every density but the dense one
    total += sum(g.width / 8 + 4 * w for g in structure if g.kind == WEIGHT for w in g.grid[:-1])
    return int(total)


def drop_work(structure: Structure) -> float:
    """Multiplications of the drop pass."""
    return float(sum(n**3 for n in gram_columns(structure).values()))


def gram_columns(structure: Structure) -> dict[str, int]:
    """Columns of the Gram of every weight that reads a group, those that are compensated in blocks by their blocks.

    And of every matrix that is rounded or whose zeros are searched.
    """
    shapes: Mapping[str, Sequence[int]] = {t.name: t.shape for op in structure.ops for t in op.tensors}
    groups = [g for g in structure if g.narrows]
    read = {(s.tensor, s.dim) for g in groups for s in g.slices if s.role == "consume" and s.tensor in shapes}
    whole = {name: math.prod(shapes[name][1:]) for g in structure if g.kind != WEIGHT for name in g.matrices}
    side = {op.weight: op.outputs for op in structure.ops}
    whole |= {g.name: g.width // shapes[g.name][side[g.name]] for g in structure if g.kind == WEIGHT}
    own = {n: shapes[n][dim] * math.prod(shapes[n][2:]) for n, dim in sorted(read) if len(shapes[n]) > 1}
    return {name: min(LARGEST, columns) for name, columns in (whole | own).items()}


@contextmanager
def measured() -> Iterator[list[int]]:
    """The most memory of its own that this process holds inside, as the list's one number at the end.

    Looked at a hundred times a second; pages of files count nothing, as processes share them. Empty where the system
    does not tell.
    """
    seen, stop = [own_memory()], threading.Event()

    def look() -> None:
        while not stop.wait(EVERY_S):
            seen.append(own_memory())
            seen[:] = [max(seen)]

    watcher = threading.Thread(target=look, name="memory", daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        stop.set()
        watcher.join()
        seen[:] = [most] if (most := max([*seen, own_memory()])) else []


def _short(need: int, free: int) -> str:
    return f"too little memory: {size(free)} are free here, and the search needs about {size(need)}"


def _sample_bytes(inputs: Any) -> int:
    """Of one sample of the example inputs."""
    leaves = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()]
    return sum(x.numel() * x.element_size() // max(1, x.shape[0]) for x in leaves)
