"""Files that are written whole or not at all: a reader, or a run after a kill, sees the old one or the new one."""

from __future__ import annotations

import json
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


def whole_lines(content: bytes) -> bytes:
    """A file of JSON lines that is being written, or was when the machine stopped, up to its last good line."""
    end = content.rfind(b"\n") + 1
    start = content.rfind(b"\n", 0, max(end - 1, 0)) + 1
    try:
        json.loads(content[start:end] or b"{}")
    except ValueError:
        end = start
    return content[:end]
