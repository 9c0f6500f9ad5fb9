"""The folder in which a level database is built: what the levels of each group are made of, and what is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from autoprune.database.build import Ingredients
from autoprune.database.consumers import Consumer
from autoprune.database.levels import Layout, Levels, layout_of, load_tensors, reader_of, save_tensors
from autoprune.structure import Group, Size, Slice, Stand

PARTS = ("atoms", "matrix", "second", "mean", "share")
"""Tensors of a consumer."""


def stored_at(folder: Path, number: int) -> Path:
    """What the levels of a group are made of."""
    return folder / f"made-of-{number:04d}.safetensors"


def levels_at(folder: Path, number: int) -> Path:
    """The levels of a group."""
    return folder / f"levels-{number:04d}.safetensors"


def claim_at(folder: Path, number: int) -> Path:
    """Says that a process makes these levels."""
    return folder / f"made-of-{number:04d}.claim"


def work_of(folder: Path, number: int) -> float:
    """See `Ingredients.work`."""
    return load_ingredients(stored_at(folder, number)).work


def save_levels(folder: Path, number: int, plain: tuple[Mapping[str, Tensor], Layout]) -> None:
    """Levels as `Levels.plain` gives them, whole or not at all."""
    save_tensors(levels_at(folder, number), *plain)


def load_levels(folder: Path, number: int) -> Levels:
    """What `save_levels` wrote, memory-mapped.

    Raises:
        InputError: the file cannot be read.
    """
    return Levels.from_plain(*load_tensors(levels_at(folder, number)))


def save_ingredients(path: Path, part: Ingredients) -> None:
    """What `load_ingredients` reads, whole or not at all."""
    tensors = {} if part.scores is None else {"scores": part.scores.cpu()}
    for i, c in enumerate(part.consumers):
        tensors |= {f"{i}.{name}": getattr(c, name) for name in PARTS} | {f"{i}.positions": c.reader.positions}
    save_tensors(path, tensors, [{"group": asdict(part.group)}, *(layout_of(c.reader) for c in part.consumers)])


def load_ingredients(path: Path) -> Ingredients:
    """What `save_ingredients` wrote, memory-mapped.

    Raises:
        InputError: the file cannot be read.
    """
    t, (first, *readers) = load_tensors(path)
    group: Any = first["group"]
    slices = tuple(Slice(**s) for s in group["slices"])
    consumers = [
        Consumer(reader_of(facts, t[f"{i}.positions"]), *(t[f"{i}.{name}"] for name in PARTS))
        for i, facts in enumerate(readers)
    ]
    sizes, stands = (Size(**s) for s in group.get("sizes", ())), (Stand(**s) for s in group.get("stands", ()))
    known = {"slices": slices, "grid": tuple(group["grid"]), "sizes": tuple(sizes), "stands": tuple(stands)}
    known["matrices"] = tuple(group.get("matrices", ()))
    return Ingredients(Group(**{**group, **known}), consumers, t.get("scores"))
