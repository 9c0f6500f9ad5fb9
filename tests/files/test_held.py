"""What processes hold is given free when they end, also by a kill; folders that they share go with the last of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autoprune.files.held import PREFIX, YOUNG_S, SharedFolder, claim

HOLD = """
import sys, time
from pathlib import Path
from autoprune.files.held import SharedFolder
folder = SharedFolder(sys.argv[1], Path(sys.argv[2]))
print(folder.path, flush=True)
if sys.argv[3] == "stay":
    time.sleep(60)
"""


@contextmanager
def holder(name: str, place: Path, then: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a shared folder, and stays or leaves."""
    command = [sys.executable, "-c", HOLD, name, str(place), then]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{place / (PREFIX + name)}\n"
            yield process
        finally:
            process.kill()


def old(folder: Path) -> Path:
    """As if nobody had touched it for long."""
    then = time.time() - 2 * YOUNG_S
    os.utime(folder, (then, then))
    return folder


def test_a_claim_is_one_processs_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "x.claim"
    with claim(path) as ours, claim(path) as theirs:
        assert (ours, theirs) == (True, False)
        assert path.exists(), "who has it removes it, and nobody else"
    assert not path.exists()
    with claim(path) as ours:
        assert ours


def test_a_shared_folder_goes_with_the_last_that_holds_it(tmp_path: Path) -> None:
    one, other = SharedFolder("run", tmp_path), SharedFolder("run", tmp_path)
    (one.path / "file").write_text("")
    path = one.path
    one.close()
    assert (path / "file").exists()
    with holder("run", tmp_path, "leave") as process:
        process.wait(30)
    assert (path / "file").exists()
    del other
    assert not path.exists()


def test_a_process_that_ends_lets_go_by_itself(tmp_path: Path) -> None:
    with holder("run", tmp_path, "leave") as process:
        process.wait(30)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    with holder("killed", tmp_path, "stay"), holder("alive", tmp_path, "stay"):
        with holder("killed", tmp_path, "stay") as second:
            second.kill()
            second.wait()
        left, alive = (old(tmp_path / f"{PREFIX}{name}") for name in ("killed", "alive"))
        SharedFolder("next", tmp_path).close()
        assert left.exists(), "one of its processes lives"
        assert alive.exists()
    young = tmp_path / f"{PREFIX}young"
    young.mkdir()
    old(left), old(alive)
    (tmp_path / "autoprune-of-others").mkdir()
    SharedFolder("next", tmp_path).close()
    assert {p.name for p in tmp_path.iterdir()} == {young.name, "autoprune-of-others"}
