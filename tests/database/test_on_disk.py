"""A database on disk: the same as in memory, also by several processes and after a kill; bad files in one line."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from autoprune import plugins
from autoprune.database import consumers, makers
from autoprune.database import on_disk as rooms
from autoprune.database.build import Ingredients, build_database
from autoprune.database.makers import Across, Beside
from autoprune.database.on_disk import build_file, building
from autoprune.database.store import LevelDatabase
from autoprune.errors import InputError
from autoprune.tracing.slim import named_tensors
from tests.small import World, world


def equal(one: LevelDatabase, other: LevelDatabase, w: World) -> bool:
    dense = {n: t.detach() for n, t in named_tensors(w.model).items()}
    for group in w.structure:
        for width in group.grid:
            a, b = (d.entries_at({group.name: width}, dense).get(group.name, {}) for d in (one, other))
            if set(a) != set(b) or not all(torch.equal(a[k], b[k]) for k in a):
                return False
            if not torch.equal(one.keep(group.name, width), other.keep(group.name, width)):
                return False
    mine, theirs = one.scores(w.structure), other.scores(w.structure)
    return all((mine[n] == theirs[n]).all() for n in w.structure.names)


@pytest.mark.parametrize(("family", "criterion"), [("projection", "obs"), ("plain", "l1_norm")])
def test_a_file_holds_what_memory_would_and_nothing_half_done(tmp_path: Path, family: str, criterion: str) -> None:
    w, made = world(family), plugins.load("criteria", criterion)()
    steps = list(building(tmp_path / "k.safetensors", w.model, w.structure, w.seen, made))
    by_stage = {stage: [s.done / s.total for s in steps if s.stage == stage] for stage in ("statistics", "drop pass")}
    assert sum(map(len, by_stage.values())) == len(steps)
    for shares in by_stage.values():
        assert shares == sorted(shares)
        assert (shares[0], shares[-1]) == (0.0, 1.0)
    whole = build_database(w.model, w.structure, w.seen, made)
    for _ in range(2):  # entries made, then found
        assert equal(whole, LevelDatabase.open(tmp_path / "k.safetensors"), w)
    assert {p.name for p in tmp_path.iterdir()} == {"k.safetensors", "k.entries"}


def test_a_consumer_in_blocks_is_written_and_read_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w, made, path = world("plain"), plugins.load("criteria", "obs")(), tmp_path / "k.safetensors"
    monkeypatch.setattr(consumers, "LARGEST", 20)
    build_file(path, w.model, w.structure, w.seen, made)
    opened = LevelDatabase.open(path)
    assert max(len(reader.parts) for levels in opened.levels.values() for reader in levels.readers) > 1
    assert equal(build_database(w.model, w.structure, w.seen, made), opened, w)


def test_a_killed_build_goes_on_with_the_group_that_it_was_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w, made, path = world("projection"), plugins.load("criteria", "obs")(), tmp_path / "k.safetensors"
    levels, seen, kill_at = Ingredients.levels, [], 2

    def watched(self: Ingredients, *given: object) -> object:
        seen.append(self.group.name)
        if len(seen) == kill_at:
            raise KeyboardInterrupt
        return levels(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Ingredients, "levels", watched)
    with pytest.raises(KeyboardInterrupt):
        build_file(path, w.model, w.structure, w.seen, made)
    assert not path.exists()
    first, kill_at = seen.pop(0), 0
    seen.clear()
    monkeypatch.setattr(rooms, "collecting", None)  # the statistics are not gathered again
    build_file(path, w.model, w.structure, w.seen, made)
    assert sorted(seen) == sorted(set(w.structure.names) - {first})
    monkeypatch.undo()
    assert equal(build_database(w.model, w.structure, w.seen, made), LevelDatabase.open(path), w)


def test_processes_that_help_make_the_same_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w, made = world("projection"), plugins.load("criteria", "obs")()
    monkeypatch.setattr(makers, "WORTH", 1.0)
    work_off = makers._work_off
    monkeypatch.setattr(makers, "_work_off", lambda *given: ())  # this one leaves all of it to the other
    build_file(tmp_path / "k.safetensors", w.model, w.structure, w.seen, made, Beside({"name": "obs"}, 2))
    monkeypatch.setattr(makers, "_work_off", work_off)
    assert equal(build_database(w.model, w.structure, w.seen, made), LevelDatabase.open(tmp_path / "k.safetensors"), w)


def test_a_cluster_makes_the_same_database_in_whatever_order_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, made = world("projection"), plugins.load("criteria", "obs")()
    monkeypatch.setattr(makers, "WORTH", 1.0)
    numbers = []

    def backwards(function: Callable[[Any], Any], items: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        for number, item in reversed(list(items)):
            numbers.append(number)
            yield number, function(pickle.loads(pickle.dumps(item)))

    build_file(tmp_path / "k.safetensors", w.model, w.structure, w.seen, made, Across(backwards))
    assert sorted(numbers) == list(range(len(w.structure)))
    assert equal(build_database(w.model, w.structure, w.seen, made), LevelDatabase.open(tmp_path / "k.safetensors"), w)


def test_a_truncated_file_is_one_clear_line(tmp_path: Path) -> None:
    w = world("plain")
    build_file(tmp_path / "k.safetensors", w.model, w.structure, w.seen, plugins.load("criteria", "obs")())
    path = tmp_path / "k.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:50])
    with pytest.raises(InputError, match="not a readable level database"):
        LevelDatabase.open(path)
    path.write_bytes(content.replace(b"0|scores", b"0|stores"))
    with pytest.raises(InputError, match="not a readable level database"):
        LevelDatabase.open(path)


def test_scores_that_are_not_finite_are_said_with_the_group(tmp_path: Path) -> None:
    w = world("plain")

    class Wrong:
        def __call__(self, *given: object) -> dict[str, torch.Tensor]:
            return {g.name: torch.full((g.width,), torch.nan) for g in w.structure}

    with pytest.raises(InputError, match="must give"):
        build_file(tmp_path / "k.safetensors", w.model, w.structure, w.seen, Wrong())
