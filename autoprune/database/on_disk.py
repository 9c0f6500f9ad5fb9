"""A level database built on disk: group after group, by whoever makes them, and on where a kill has left it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from autoprune.database.batches import StatisticsOnly
from autoprune.database.build import collecting
from autoprune.database.makers import HERE, Maker
from autoprune.database.parts import levels_at, load_levels, save_ingredients, stored_at, work_of
from autoprune.database.store import LevelDatabase
from autoprune.protocols import Criterion, Step
from autoprune.structure import Structure
from autoprune.tracing.one_thread import one_thread

STAGE = "drop pass"
"""What making the levels is called while it runs."""


def build_file(
    path: Path,
    model: nn.Module,
    structure: Structure,
    task: StatisticsOnly,
    criterion: Criterion,
    maker: Maker = HERE,
) -> None:
    """`building` to its end."""
    with one_thread():
        for _ in building(path, model, structure, task, criterion, maker):
            pass


def building(
    path: Path,
    model: nn.Module,
    structure: Structure,
    task: StatisticsOnly,
    criterion: Criterion,
    maker: Maker = HERE,
) -> Iterator[Step]:
    """Build what `LevelDatabase.open(path)` reads; `maker` ranks and factorises the groups.

    What an earlier call has left in the folder beside it is not done again.

    Raises:
        InputError: the criterion's scores are not finite, or not one for each atom.
        RunError: the disk is full, or a cluster is lost.
    """
    folder, numbers = path.with_name(f"{path.stem}.parts"), range(len(structure))
    folder.mkdir(parents=True, exist_ok=True)
    done = [structure.names[i] for i in numbers if levels_at(folder, i).exists() or stored_at(folder, i).exists()]
    for part in collecting(model, structure, task, criterion, done=done) if len(done) < len(structure) else ():
        if isinstance(part, Step):
            yield part
        else:
            save_ingredients(stored_at(folder, structure.names.index(part.group.name)), part)
    work = {i: work_of(folder, i) for i in numbers if not levels_at(folder, i).exists()}
    yield Step(STAGE, 0.0, sum(work.values()) or 1.0)
    for _ in maker(folder, work, criterion):
        yield _made_of(folder, work)
    levels = {g.name: load_levels(folder, i) for i, g in enumerate(structure)}
    LevelDatabase.of(levels).save(path)
    shutil.rmtree(folder, ignore_errors=True)


def _made_of(folder: Path, work: Mapping[int, float]) -> Step:
    """How much of the work is done, by whomever."""
    return Step(STAGE, sum(w for i, w in work.items() if levels_at(folder, i).exists()), sum(work.values()) or 1.0)
