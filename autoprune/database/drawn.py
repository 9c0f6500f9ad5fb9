"""Batches kept in the type that they came in, in memory or in files that all processes of a machine share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten, treespec_dumps, treespec_loads
from torch.utils.data import DataLoader

from autoprune.database.rows import as_tensors, chunks, cut, joined, kind, samples_of, size, take, tensors_of
from autoprune.errors import InputError, RunError, one_line
from autoprune.protocols import Batch

SMALL = 64 << 20
"""Bytes of batches up to which they stay in memory, ready for the model."""
WIDER = 4
"""Times that a batch may grow when it is made ready: bytes become float32."""
Ready = Callable[[Batch], Batch]
CPU = torch.device("cpu")
INDEX = "index.json"


@dataclass(frozen=True, eq=False)
class Drawn(Sequence[Batch]):
    """Batches as they were drawn (`raw`), made ready for the model each time that one is asked for.

    `ready` turns what is kept into what the split gives, as bytes into normalised pictures; None where that is the
    same. Then a batch goes to `device`, its 4-d tensors in `layout`. Small ones are made ready once.
    """

    raw: tuple[Batch, ...]
    ready: Ready | None = None
    device: torch.device = CPU
    layout: torch.memory_format = torch.contiguous_format
    _made: dict[int, Batch] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.raw)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Drawn: ...
    def __getitem__(self, index: int | slice) -> Batch:
        if isinstance(index, slice):
            return self.of(self.raw[index])
        number = range(len(self.raw))[index]
        if number not in self._made:
            made = prepare(self._ready(self.raw[number]), self.device, self.layout)
            if not self.is_small:
                return made
            self._made[number] = made
        return self._made[number]

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self.raw)))

    @cached_property
    def is_small(self) -> bool:
        """Whether all of it may lie in memory, ready."""
        return bytes_of(self.raw) * (1 if self.ready is None else WIDER) <= SMALL

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each batch."""
        return tuple(map(size, self.raw))

    @property
    def samples(self) -> int:
        return sum(self.sizes)

    def of(self, raw: Sequence[Batch]) -> Drawn:
        """Other batches of the same kind."""
        return Drawn(tuple(raw), self.ready, self.device, self.layout)

    def cut_to(self, batch_size: int) -> Drawn:
        """The same samples in batches of this size, see `chunks`."""
        raw = [part for batch in self.raw for part in chunks(batch, batch_size)]
        return self if len(raw) == len(self.raw) else self.of(raw)

    def first(self, samples: int) -> Drawn:
        """The batches of the first `samples` samples, the last one cut."""
        raw: list[Batch] = []
        made: dict[int, Batch] = {}
        for i, n in enumerate(self.sizes):
            if samples <= 0:
                break
            raw.append(cut(self.raw[i], 0, min(n, samples)))
            if self.is_small:
                made[i] = cut(self[i], 0, min(n, samples))
            samples -= n
        return replace(self, raw=tuple(raw), _made=made)

    def taken(self, number: int, index: Tensor) -> Batch:
        """Samples of one batch, by their places in it."""
        if self.is_small:
            return take(self[number], index.to(self.device))
        return prepare(self._ready(take(self.raw[number], index)), self.device, self.layout)

    def on(self, device: torch.device, layout: torch.memory_format) -> Drawn:
        """The same made ready for another device and format."""
        return replace(self, device=device, layout=layout, _made={})

    def _ready(self, batch: Batch) -> Batch:
        return batch if self.ready is None else self.ready(batch)

    def __reduce__(self) -> Any:  # what was made ready does not travel
        return Drawn, (self.raw, self.ready, self.device, self.layout)


def total(batches: Sequence[Batch]) -> int:
    """Samples of all batches."""
    return batches.samples if isinstance(batches, Drawn) else sum(map(size, batches))


class TooMuchError(Exception):
    """More was drawn than may be kept."""


def samples_in(split: Iterable[Batch]) -> int:
    """How many samples a split has: as it or its loader says, else counted in a pass over it."""
    known = getattr(split, "samples", None)
    if isinstance(known, int):
        return known
    loader = getattr(split, "loader", None)
    if isinstance(loader, DataLoader) and isinstance(loader.batch_size, int) and isinstance(loader.sampler, Sized):
        n = len(loader.sampler)
        return n // loader.batch_size * loader.batch_size if loader.drop_last else n
    return sum(size(as_tensors(batch)) for batch in split)


def draw(split: Iterable[Batch], samples: int, folder: Path | None = None, most: int | None = None) -> Drawn:
    """The first `samples` samples of a split, joined into as few batches as their shapes allow; usually one.

    A split may have more than its batches: `stored()`, the same ones in the type in which they should be kept, and
    `ready`, a function that makes one of those what the split gives. With a `folder` more than a little goes to files
    there as it comes. Batches of other lengths follow each other; one that is one piece counts as a sample.

    Raises:
        InputError: the split yields no batch.
        TooMuchError: it would be more than `most` bytes.
    """
    stored = getattr(split, "stored", None)
    source: Iterable[Batch] = split if stored is None else stored()
    runs: list[_Run] = []
    n, held, before = 0, 0, None
    for batch in source:
        part = cut(as_tensors(batch), 0, samples - n)
        n, held, alike = n + size(part), held + bytes_of(part), kind(part)
        if not runs or alike is None or alike != before:
            runs.append(_Run(len(runs)))
        runs[-1].add(part)
        before = alike
        if most is not None and held > most:
            raise TooMuchError
        if folder is not None and held > SMALL:
            for run in runs:
                run.spill(folder)
        if n >= samples:
            break
    if not runs:
        raise InputError("a split of the task yields no batch")
    if folder is not None and all(run.spilled for run in runs):
        text = json.dumps([run.facts() for run in runs])
        (folder / INDEX).write_text(text, encoding="utf-8")
    return Drawn(tuple(run.whole() for run in runs), None if stored is None else split.ready)  # type: ignore[attr-defined]


def opened(split: Iterable[Batch], folder: Path) -> Drawn | None:
    """What another process has drawn from this split to `folder`, mapped into memory; None where it kept it itself."""
    try:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Drawn(tuple(_opened(folder, run) for run in found), getattr(split, "ready", None))


class _Run:
    """Batches of one kind that follow each other: in memory, or their rows at the end of files."""

    def __init__(self, number: int) -> None:
        self._number, self._parts = number, list[Batch]()
        self._files: list[_Rows] = []
        self._spec: Any = None

    def add(self, batch: Batch) -> None:
        self._parts.append(batch)

    def spill(self, folder: Path) -> None:
        """What has come so far goes to files; batches with anything but rows of samples in them stay in memory."""
        if not self._parts or any(not _is_plain(batch) for batch in self._parts):
            return
        for batch in self._parts:
            leaves, self._spec = tree_flatten(batch)
            if not self._files:
                names = (folder / f"{self._number}-{i}.bin" for i in range(len(leaves)))
                self._files = [_Rows(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
            for file, leaf in zip(self._files, leaves, strict=True):
                file.add(leaf)
        self._parts = []

    def whole(self) -> Batch:
        if not self._files:
            return joined(self._parts)
        return tree_unflatten([file.mapped() for file in self._files], self._spec)

    @property
    def spilled(self) -> bool:
        return bool(self._files)

    def facts(self) -> Mapping[str, Any]:
        return {"tree": treespec_dumps(self._spec), "tensors": [file.facts() for file in self._files]}


class _Rows:
    """Rows of a tensor in a file, written one batch after the other."""

    def __init__(self, path: Path, first: Tensor) -> None:
        self._path, self._type, self._row, self._count = path, first.dtype, tuple(first.shape[1:]), 0

    def add(self, rows: Tensor) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab" if self._count else "wb") as file:
                file.write(rows.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        except OSError as error:
            raise RunError(f"{self._path}: samples cannot be kept there: {one_line(error)}") from error
        self._count += len(rows)

    def facts(self) -> Mapping[str, Any]:
        kind_of = str(self._type).removeprefix("torch.")
        return {"file": self._path.name, "type": kind_of, "shape": [self._count, *self._row]}

    def mapped(self) -> Tensor:
        return _mapped(self._path.parent, self.facts())


def _mapped(folder: Path, facts: Mapping[str, Any]) -> Tensor:
    shape, path = facts["shape"], folder / facts["file"]
    numbers = torch.from_file(str(path), False, math.prod(shape), dtype=getattr(torch, facts["type"]))
    return numbers.view(shape)


def _opened(folder: Path, run: Mapping[str, Any]) -> Batch:
    return tree_unflatten([_mapped(folder, facts) for facts in run["tensors"]], treespec_loads(run["tree"]))


def _is_plain(batch: Batch) -> bool:
    """Whether all that a batch holds is tensors of a row a sample (or several)."""
    n = samples_of(batch)
    leaves = tree_flatten(batch)[0]
    return n is not None and all(isinstance(t, Tensor) and t.dim() and len(t) % n == 0 for t in leaves)


def bytes_of(tree: Any) -> int:
    """What the tensors of a tree take."""
    return sum(t.numel() * t.element_size() for t in tensors_of(tree))


def prepare(batch: Batch, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> Batch:
    """A batch on `device`, its 4-d tensors in this memory format."""

    def move(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        t = t.to(device)
        return t.contiguous(memory_format=memory_format) if t.dim() == 4 else t

    return tree_map(move, batch)
