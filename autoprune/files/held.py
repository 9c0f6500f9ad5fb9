"""Files that one process holds at a time, folders that several do: given free by the system, however a process ends."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    FAR = 1 << 20
    """Locks bind there: a byte behind the text, which others may read."""

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


PREFIX = "autoprune-shared-"
YOUNG_S = 60.0
"""A folder that nobody holds may be one that is just being made."""


def take(descriptor: int) -> bool:
    """Hold an open file until its descriptor is closed; False where another one holds it."""
    try:
        _lock(descriptor)
    except OSError:
        return False
    return True


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether `path`, a file that is there as long as it is held, is ours inside; False where another one holds it.

    Raises:
        OSError: there is no writing in its folder.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        ours = take(descriptor)
        try:
            yield ours
        finally:
            if ours:
                with suppress(OSError):  # Windows removes nothing that is open
                    path.unlink()
    finally:
        os.close(descriptor)


class SharedFolder:
    """A folder of this machine, called `name`, for processes that share no other; gone when the last lets go of it.

    What processes that were killed have left is removed by whoever comes next, under any name.

    Raises:
        OSError: there is no writing in the system's folder of temporary files.
    """

    def __init__(self, name: str, place: Path | None = None) -> None:
        place = Path(tempfile.gettempdir()) if place is None else place
        for other in place.glob(f"{PREFIX}*"):
            with suppress(OSError):
                if time.time() - other.stat().st_mtime > YOUNG_S:
                    _remove_unheld(other)
        self.path = place / f"{PREFIX}{name}"
        self.path.mkdir(mode=0o700, exist_ok=True)
        own = self.path / f"{secrets.token_hex(8)}.held"
        descriptor = os.open(own, os.O_RDWR | os.O_CREAT, 0o600)
        take(descriptor)
        self.close = weakref.finalize(self, _let_go, own, descriptor)


def _let_go(own: Path, descriptor: int) -> None:
    os.close(descriptor)
    with suppress(OSError):
        own.unlink(missing_ok=True)
        _remove_unheld(own.parent)


def _remove_unheld(folder: Path) -> None:
    for path in folder.glob("*.held"):
        descriptor = os.open(path, os.O_RDWR)
        free = take(descriptor)
        os.close(descriptor)
        if not free:
            return
    shutil.rmtree(folder, ignore_errors=True)
