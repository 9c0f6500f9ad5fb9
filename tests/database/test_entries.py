"""Entries are made once, kept as long as they fit, and shared through their folder."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from autoprune.database import entries as module
from autoprune.database.entries import Entries, Entry, Make

SIZE = 4000
HOLD = """
import sys, time
from pathlib import Path
from autoprune.files.held import claim
with claim(Path(sys.argv[1])) as ours:
    print(ours, flush=True)
    time.sleep(60)
"""


class Maker:
    """Counts what it makes."""

    def __init__(self) -> None:
        self.made: list[float] = []

    def of(self, entries: Entries, value: float) -> Tensor:
        def make() -> dict[str, Tensor]:
            self.made.append(value)
            return {"weight": torch.full((SIZE // 4,), float(value))}

        return entries.get({f"e-{value:g}": make})[f"e-{value:g}"]["weight"]


def test_what_fits_is_made_once_and_what_was_used_last_stays() -> None:
    entries, maker = Entries(2 * SIZE), Maker()
    for value in (1, 2, 1, 3, 1, 2):
        assert bool((maker.of(entries, value) == value).all())
    assert maker.made == [1, 2, 3, 2]


def test_one_that_is_larger_than_the_limit_is_given_all_the_same(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        assert bool((Maker().of(Entries(10, folder), 5) == 5).all())
    assert list(tmp_path.iterdir()) == []


def full(value: float) -> Entry:
    return {"weight": torch.full((SIZE // 4,), float(value))}


@contextmanager
def held_by_another(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has claimed `path` and makes nothing."""
    path.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "True\n"
            yield process
        finally:
            process.kill()


def test_what_another_is_making_comes_last_and_is_not_made_twice(tmp_path: Path) -> None:
    """Two that begin with the same candidate share its entries out between them."""
    made: list[str] = []
    both = threading.Barrier(2, timeout=60)

    def maker(name: str) -> Make:
        def make() -> Entry:
            made.append(name)
            if name in "ab":  # each is at one of the first two while the other wants it
                both.wait()
            return full(ord(name))

        return make

    found: list[dict[str, Entry]] = []
    wanted = {name: maker(name) for name in "abcdef"}

    def get() -> None:
        entries = Entries(100 * SIZE, tmp_path)
        entries._patience_s = 60.0
        found.append(entries.get(wanted))

    threads = [threading.Thread(target=get) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert sorted(made) == list("abcdef")
    assert [{n: float(e["weight"][0]) for n, e in each.items()} for each in found] == [{n: ord(n) for n in wanted}] * 2
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors"}, "no claim is left"


def test_a_claim_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    entries = Entries(10 * SIZE, tmp_path)
    entries._patience_s = 60.0
    with held_by_another(tmp_path / "e-1.claim") as process:
        threading.Timer(0.2, process.kill).start()
        since = time.monotonic()
        assert Maker().of(entries, 1)[0] == 1
        assert 0.15 < time.monotonic() - since < 20


def test_one_that_another_does_not_come_to_an_end_with_is_made_here(tmp_path: Path) -> None:
    maker, entries = Maker(), Entries(10 * SIZE, tmp_path)
    with held_by_another(tmp_path / "e-1.claim"):
        since = time.monotonic()
        assert maker.of(entries, 1)[0] == 1
        assert time.monotonic() - since > module.PATIENCE_S
        assert maker.made == [1]
        assert torch.equal(maker.of(Entries(10 * SIZE, tmp_path), 1), maker.of(entries, 1)), "all the same for all"
        assert maker.made == [1]


def test_what_others_have_made_room_for_is_let_go_of_here_too(tmp_path: Path) -> None:
    """The limit is that of all together: what is mapped but gone counts for nobody."""
    limit = int(3.5 * SIZE)
    one, other, maker = Entries(limit, tmp_path), Entries(limit, tmp_path), Maker()
    for value in (1, 2, 3):
        maker.of(one, value)
    for value in (4, 5):
        maker.of(other, value)
    maker.of(one, 6)
    assert set(one._kept) == {p.stem for p in tmp_path.iterdir()} & {"e-1", "e-2", "e-3", "e-6"}


def test_what_was_used_last_by_anybody_stays_in_the_folder(tmp_path: Path) -> None:
    limit = int(3.5 * SIZE)
    one, other, maker = Entries(limit, tmp_path), Entries(limit, tmp_path), Maker()
    for value in (1, 2, 3):
        maker.of(one, value)
        time.sleep(0.01)
    maker.of(one, 1)
    time.sleep(0.01)
    maker.of(other, 4)
    assert {p.stem for p in tmp_path.iterdir()} == {"e-1", "e-3", "e-4"}


def test_processes_share_what_lies_in_the_folder_and_it_stays_below_the_limit(tmp_path: Path) -> None:
    limit = int(3.5 * SIZE)
    one, other, maker = Entries(limit, tmp_path), Entries(limit, tmp_path), Maker()
    held = maker.of(one, 1)
    assert torch.equal(maker.of(other, 1), held)
    assert maker.made == [1]
    for value in range(2, 9):
        maker.of(other, value)
        assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= limit
    assert not (tmp_path / "e-1.safetensors").exists()
    assert bool((held == 1).all()), "what is in use stays readable"


def test_a_broken_file_is_made_anew_and_a_folder_that_is_gone_costs_the_sharing_only(tmp_path: Path) -> None:
    maker = Maker()
    maker.of(Entries(10 * SIZE, tmp_path), 1)
    path = tmp_path / "e-1.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert bool((maker.of(Entries(10 * SIZE, tmp_path), 1) == 1).all())
    (tmp_path / "file").write_text("")
    assert bool((maker.of(Entries(10 * SIZE, tmp_path / "file" / "x"), 2) == 2).all())
    assert maker.made == [1, 1, 2]
