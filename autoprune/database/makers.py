"""Who makes the levels of a database's groups: this process, others beside it, or a cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from autoprune import plugins
from autoprune.database.build import Ingredients
from autoprune.database.levels import Layout
from autoprune.database.parts import claim_at, levels_at, load_ingredients, save_levels, stored_at, work_of
from autoprune.errors import InputError
from autoprune.protocols import Criterion, GramCriterion
from autoprune.tracing.one_thread import one_thread

WORTH = 2e11
"""Multiplications that are worth another process: some ten seconds of one core."""
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from autoprune.database.makers import help_build; help_build(*sys.argv[2:])"
)
"""What helps runs by `python -c`: never the main module, so a user's script needs no guard."""
POLL_S = 0.5
"""How often helping processes are looked after."""
CPU = torch.device("cpu")

Each = Callable[[Callable[[Any], Any], Iterable[tuple[int, Any]]], Iterator[tuple[int, Any]]]
"""Calls a function with every item, somewhere; gives (number, result) as they come."""


class Maker(Protocol):
    """Makes the levels of the groups of `work` (multiplications by the group's number), the largest first."""

    def __call__(self, folder: Path, work: Mapping[int, float], criterion: Criterion) -> Iterator[object]:
        """Yields whenever there may be news; what is there already is left alone.

        Raises:
            InputError: the criterion's scores are not finite, or not one for each atom.
        """


@dataclass(frozen=True)
class Here:
    """This process alone, on `device`."""

    device: torch.device = CPU

    def __call__(self, folder: Path, work: Mapping[int, float], criterion: Criterion) -> Iterator[object]:
        for i in _largest_first(work):
            _make(folder, i, criterion, self.device)
            yield i


HERE = Here()


@dataclass(frozen=True)
class Beside:
    """This process and others, `workers` together at most and no more than the work is worth.

    Criteria that work on Grams are built anew there as `named` says (name and options).
    """

    named: Mapping[str, Any]
    workers: int

    def __call__(self, folder: Path, work: Mapping[int, float], criterion: Criterion) -> Iterator[object]:
        for claim in folder.glob("*.claim"):  # of a process that was killed
            claim.unlink(missing_ok=True)
        helpers = self._start(folder, criterion, min(self.workers - 1, int(sum(work.values()) / WORTH)))
        try:
            yield from _work_off(folder, work, criterion)
            while any(helper.poll() is None for helper in helpers):
                time.sleep(POLL_S)
                yield None
            yield from HERE(folder, work, criterion)  # what a helper began and did not end
        finally:
            for helper in helpers:
                helper.kill()

    def _start(self, folder: Path, criterion: Criterion, count: int) -> list[subprocess.Popen[bytes]]:
        named = dict(self.named) if isinstance(criterion, GramCriterion) else {}
        given = (json.dumps(sys.path), str(folder), json.dumps(named), str(os.getpid()))
        command = [sys.executable, "-c", BOOT, *given]
        return [
            subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(count)
        ]  # what fails, fails here too


@dataclass(frozen=True)
class Across:
    """The machines that `each` reaches, on the `device` that each of them has; small work is done here."""

    each: Each
    device: Callable[[], torch.device] = lambda: CPU

    def __call__(self, folder: Path, work: Mapping[int, float], criterion: Criterion) -> Iterator[object]:
        if sum(work.values()) < WORTH:
            yield from Here(drops_on(self.device()))(folder, work, criterion)
            return
        missing = (i for i in _largest_first(work) if not levels_at(folder, i).exists())
        items = ((i, load_ingredients(stored_at(folder, i))) for i in missing)
        for i, made in self.each(_Job(criterion, self.device), items):
            save_levels(folder, i, made)
            yield i


@dataclass(frozen=True)
class _Job:
    """What a machine of a cluster does with a group."""

    criterion: Criterion
    device: Callable[[], torch.device]

    def __call__(self, part: Ingredients) -> tuple[dict[str, Tensor], Layout]:
        with one_thread():
            tensors, layout = part.on(drops_on(self.device())).levels(self.criterion).plain()
            return {name: tensor.cpu() for name, tensor in tensors.items()}, layout


def drops_on(device: torch.device) -> torch.device:
    """Where drops are computed that a `device` is there for: in float64 at need, which not every kind has."""
    return device if device.type == "cuda" else CPU


def help_build(folder: str, named: str, parent: str) -> None:
    """What another process does: groups that nobody has claimed, until there is none or `parent` is gone."""
    given, place = json.loads(named), Path(folder)
    options = given.get("options") or {}
    criterion = plugins.build("criteria", given["name"], options, "criterion.options") if given else None
    numbers = {int(p.stem.rsplit("-", 1)[1]) for p in place.glob("made-of-*.safetensors")}
    with one_thread(), suppress(InputError):  # the first process meets what is wrong too, and says it
        for _ in _work_off(place, {i: work_of(place, i) for i in numbers}, criterion, parent=int(parent)):
            pass


def _work_off(
    folder: Path, work: Mapping[int, float], criterion: Criterion | None, parent: int | None = None
) -> Iterator[int]:
    """Make the levels of the groups that nobody has claimed; yields each group's number."""
    for i in _largest_first(work):
        if parent not in (None, os.getppid()):
            return
        try:
            claim_at(folder, i).touch(exist_ok=False)
        except FileExistsError:
            continue
        _make(folder, i, criterion)
        yield i


def _make(folder: Path, number: int, criterion: Criterion | None, device: torch.device = CPU) -> None:
    if not levels_at(folder, number).exists():
        save_levels(folder, number, load_ingredients(stored_at(folder, number)).on(device).levels(criterion).plain())


def _largest_first(work: Mapping[int, float]) -> list[int]:
    return sorted(work, key=lambda i: -work[i])
