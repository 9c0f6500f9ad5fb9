"""A level database built on disk: group after group, by several processes, and on where a kill has left it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from autoprune import plugins
from autoprune.database.batches import StatisticsOnly
from autoprune.database.build import Ingredients, collecting
from autoprune.database.consumers import Consumer
from autoprune.database.levels import Levels, layout_of, load_tensors, reader_of, save_tensors
from autoprune.database.store import LevelDatabase
from autoprune.errors import InputError
from autoprune.protocols import Criterion, GramCriterion, Step
from autoprune.structure import Group, Slice, Structure
from autoprune.tracing.one_thread import one_thread

WORTH = 2e11
"""Multiplications that are worth another process: some ten seconds of one core."""
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from autoprune.database.on_disk import help_build; help_build(*sys.argv[2:])"
)
"""What helps runs by `python -c`: never the main module, so a user's script needs no guard."""
POLL_S = 0.5
"""How often helping processes are looked after."""
STAGE = "drop pass"
"""What making the levels is called while it runs."""
PARTS = ("atoms", "matrix", "second", "mean", "share")
"""Tensors of a consumer."""


def build_file(
    path: Path,
    model: nn.Module,
    structure: Structure,
    task: StatisticsOnly,
    criterion: Criterion,
    *,
    named: Mapping[str, Any] | None = None,
    workers: int = 1,
) -> None:
    """`building` to its end."""
    with one_thread():
        for _ in building(path, model, structure, task, criterion, named=named, workers=workers):
            pass


def building(
    path: Path,
    model: nn.Module,
    structure: Structure,
    task: StatisticsOnly,
    criterion: Criterion,
    *,
    named: Mapping[str, Any] | None = None,
    workers: int = 1,
) -> Iterator[Step]:
    """Build what `LevelDatabase.open(path)` reads, with up to `workers` processes where there is work for them.

    What an earlier call has left in the folder beside it is not done again. A criterion that works on Grams is built
    anew by the helping processes as `named` says (name and options); without that this process works alone.

    Raises:
        InputError: the criterion's scores are not finite, or not one for each atom.
        RunError: the disk is full.
    """
    folder, numbers = path.with_name(f"{path.stem}.parts"), range(len(structure))
    folder.mkdir(parents=True, exist_ok=True)
    if not all(_levels(folder, i).exists() or _stored(folder, i).exists() for i in numbers):
        for i, part in enumerate((yield from collecting(model, structure, task, criterion))):
            save_ingredients(_stored(folder, i), part)
    for claim in folder.glob("*.claim"):  # of a process that was killed
        claim.unlink(missing_ok=True)
    work = {i: _work(_stored(folder, i)) for i in numbers if not _levels(folder, i).exists()}
    yield Step(STAGE, 0.0, sum(work.values()) or 1.0)
    given = named if isinstance(criterion, GramCriterion) else {}
    helpers = _start(folder, given, min(workers - 1, int(sum(work.values()) / WORTH)))
    try:
        for _ in _work_off(folder, work, criterion):
            yield _made_of(folder, work)
        while any(helper.poll() is None for helper in helpers):
            time.sleep(POLL_S)
            yield _made_of(folder, work)
        for i in work:
            _made(folder, i, criterion)  # what a helper began and did not end
    finally:
        for helper in helpers:
            helper.kill()
    levels = {g.name: Levels.from_plain(*load_tensors(_levels(folder, i))) for i, g in enumerate(structure)}
    LevelDatabase.of(levels).save(path)
    shutil.rmtree(folder, ignore_errors=True)


def help_build(folder: str, named: str, parent: str) -> None:
    """What another process does: groups that nobody has claimed, until there is none or `parent` is gone."""
    given, place = json.loads(named), Path(folder)
    options = given.get("options") or {}
    criterion = plugins.build("criteria", given["name"], options, "criterion.options") if given else None
    numbers = {int(p.stem.rsplit("-", 1)[1]) for p in place.glob("made-of-*.safetensors")}
    with one_thread(), suppress(InputError):  # the first process meets what is wrong too, and says it
        for _ in _work_off(place, {i: _work(_stored(place, i)) for i in numbers}, criterion, parent=int(parent)):
            pass


def _work_off(
    folder: Path, work: Mapping[int, float], criterion: Criterion | None, parent: int | None = None
) -> Iterator[int]:
    """Make the levels of the groups that nobody has claimed, the largest first; yields each group's number."""
    for i in sorted(work, key=lambda i: -work[i]):
        if parent not in (None, os.getppid()):
            return
        try:
            _claim(folder, i).touch(exist_ok=False)
        except FileExistsError:
            continue
        _made(folder, i, criterion)
        yield i


def _made_of(folder: Path, work: Mapping[int, float]) -> Step:
    """How much of the work is done, by whomever."""
    return Step(STAGE, sum(w for i, w in work.items() if _levels(folder, i).exists()), sum(work.values()) or 1.0)


def _made(folder: Path, number: int, criterion: Criterion | None) -> None:
    path = _levels(folder, number)
    if not path.exists():
        save_tensors(path, *load_ingredients(_stored(folder, number)).levels(criterion).plain())


def _start(folder: Path, named: Mapping[str, Any] | None, count: int) -> list[subprocess.Popen[bytes]]:
    if named is None:
        return []
    given = (json.dumps(sys.path), str(folder), json.dumps(dict(named)), str(os.getpid()))
    command = [sys.executable, "-c", BOOT, *given]
    return [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(count)]  # what fails, fails here too


def save_ingredients(path: Path, part: Ingredients) -> None:
    """What `load_ingredients` reads, whole or not at all."""
    tensors = {} if part.scores is None else {"scores": part.scores.double().cpu()}
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
    return Ingredients(Group(**{**group, "slices": slices, "grid": tuple(group["grid"])}), consumers, t.get("scores"))


def _work(path: Path) -> float:
    return load_ingredients(path).work


def _stored(folder: Path, number: int) -> Path:
    """What the levels of a group are made of."""
    return folder / f"made-of-{number:04d}.safetensors"


def _levels(folder: Path, number: int) -> Path:
    """The levels of a group."""
    return folder / f"levels-{number:04d}.safetensors"


def _claim(folder: Path, number: int) -> Path:
    """Says that a process makes these levels."""
    return folder / f"made-of-{number:04d}.claim"
