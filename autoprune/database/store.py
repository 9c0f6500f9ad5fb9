"""The level database: for every group and width the kept atoms and its consumers' compensated weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from autoprune.database.batches import StatisticsOnly, digest
from autoprune.database.entries import Entries, Entry
from autoprune.database.factors import Factored
from autoprune.database.levels import Levels, load_tensors, save_tensors, unreadable
from autoprune.protocols import FloatArray
from autoprune.structure import Structure

ALGORITHM = "3"
"""To be raised when the same inputs give other entries, so that no old one is taken for a new one."""
MEMORY = 2 << 30
"""Bytes of entries that are kept where nobody says how many."""


@dataclass(frozen=True)
class LevelDatabase:
    """One factor for each consumer instead of weights for each width; entries are made from it when asked for.

    A database that was read from a file is memory-mapped and keeps its entries beside it, so that all workers of a
    node share both.
    """

    levels: Mapping[str, Levels]
    entries: Entries

    @staticmethod
    def of(levels: Mapping[str, Levels], memory: int = MEMORY) -> LevelDatabase:
        """In this process alone."""
        return LevelDatabase(levels, Entries(memory))

    def keep(self, group: str, width: int) -> Tensor:
        """Kept atoms, ascending, int64 [width]."""
        return self.levels[group].kept(width)

    def entries_at(self, widths: Mapping[str, int], dense: Mapping[str, Tensor]) -> dict[str, Entry]:
        """See `Levels.entry`, by group; nothing of the dense width. `dense` are the weights that it was built from."""
        numbers = {group: f"{i:04d}-{widths[group]}" for i, group in enumerate(self.levels) if group in widths}
        narrow = {group: name for group, name in numbers.items() if widths[group] < len(self.levels[group].order)}
        makers = {name: partial(self.levels[group].entry, widths[group], dense) for group, name in narrow.items()}
        made = self.entries.get(makers)
        return {group: made[name] for group, name in narrow.items()}

    def matrix(self, group: str, tensor: str) -> Factored | None:
        """What is known of the inputs of a matrix, under the name of its precision or of the matrix itself."""
        return next((f for f in self.levels[group].readers if f.reader.weight == tensor), None)

    def scores(self, structure: Structure) -> dict[str, FloatArray]:
        """The criterion's scores of every group of `structure`."""
        return {g.name: self.levels[g.name].scores.numpy() for g in structure.groups}

    def said(self) -> tuple[str, ...]:
        """What a user ought to know of how the weights are compensated."""
        readers = [f for levels in self.levels.values() for f in levels.readers]
        cut = sorted({f.reader.weight for f in readers if len(f.parts) > 1})
        exact = sorted({f.reader.weight for f in readers if any(p.ill_conditioned for p in f.parts)})
        said = []
        if cut:
            said.append(
                f"{cut[0]}{_more(cut)} reads too many columns for one Gram: its inputs make up for each other within "
                "blocks of channels only"
            )
        if exact:
            said.append(f"the inputs of {exact[0]}{_more(exact)} are nearly dependent: compensated in float64")
        return tuple(said)

    def save(self, path: Path) -> None:
        """Write a whole file or none."""
        tensors: dict[str, Tensor] = {}
        layout = {}
        for i, (name, levels) in enumerate(self.levels.items()):
            own, layout[name] = levels.plain()
            tensors |= {f"{i}|{key}": tensor for key, tensor in own.items()}
        save_tensors(path, tensors, layout)

    @staticmethod
    def open(path: Path, memory: int = MEMORY) -> LevelDatabase:
        """Read a file; `memory`: bytes of entries that are kept, in the folder beside it.

        Raises:
            InputError: it cannot be read.
        """
        tensors, layout = load_tensors(path)
        groups: list[dict[str, Tensor]] = [{} for _ in layout]
        try:
            for key, tensor in tensors.items():
                number, _, name = key.partition("|")
                groups[int(number)][name] = tensor
            levels = {n: Levels.from_plain(groups[i], facts) for i, (n, facts) in enumerate(layout.items())}
        except (KeyError, ValueError, IndexError, AttributeError) as error:
            raise unreadable(path, error) from None
        return LevelDatabase(levels, Entries(memory, entries_folder(path)))


def entries_folder(path: Path) -> Path:
    """Where the entries of the database at `path` lie."""
    return path.with_name(f"{path.stem}.entries")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def database_key(weights: str, structure: Structure, task: StatisticsOnly, criterion: str) -> str:
    """16 hex digits of all that decides the entries: weights (their fingerprint), structure, samples and criterion."""
    names = repr([(g.name, g.width) for g in structure.groups])
    parts = (ALGORITHM, structure.fingerprint, weights, digest(task.statistics), criterion, names)
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
