"""The lock of a run folder: one process at a time, given free by the system when the process ends, however it ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autoprune.errors import InputError
from autoprune.files.held import take

LOCK = "study.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder without opening its record; InputError where another process uses it."""
    descriptor = lock(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def lock(folder: Path) -> int:
    """Take the folder for this process; closing the descriptor gives it free.

    Raises:
        InputError: another process uses the folder.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    if not take(descriptor):
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise InputError(f"{folder} is in use by {holder}; wait for it or choose another folder")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor
