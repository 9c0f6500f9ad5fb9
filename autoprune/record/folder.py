"""The run folder: made, kept clean where a job is refused, and its log."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from autoprune.errors import InputError
from autoprune.record.lock import LOCK


def make_folder(folder: Path) -> None:
    """The run folder, made where there is none; InputError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --out {folder}: {error.strerror}") from None


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make the run folder for what follows; where that is refused, no folder stays that is new and holds no file.

    What was built until then (level database, latency table) took its time and stays: the corrected call uses it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    held_before = (folder / LOCK).exists()
    try:
        yield
    except BaseException:
        if not held_before:
            (folder / LOCK).unlink(missing_ok=True)
        inside = sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True) if made else []
        for path in (*inside, *made):  # from within outwards
            with suppress(OSError):  # it holds something
                path.rmdir()
        raise


def write_event(folder: Path, event: str, facts: Mapping[str, Any]) -> None:
    """Append one line to the run's log.jsonl."""
    line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}, default=str)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(line + "\n")
