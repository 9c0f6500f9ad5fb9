"""Files that are written whole or not at all: a reader, or a run after a kill, sees the old one or the new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft beside `path`, in a folder that is made where there is none; it takes the place of `path` at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    yield draft
    os.replace(draft, path)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole, on the disk before it takes its name."""
    with whole(path) as draft, draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
