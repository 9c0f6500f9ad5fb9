"""What a fit has measured so far, in a file from which the next call goes on where this one is killed."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from autoprune.files.whole import write_whole
from autoprune.latency.timing import Timing

EVERY_S = 2.0
"""How often single operations are written at most; whole models are at once."""


class Kept:
    """Times of operations by (number, rows, columns) in ms, and of the first whole models.

    Without a `path` nothing is written; a file that cannot be read holds nothing. Its name must say what is measured.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._written = path, time.monotonic()
        self.operations: dict[tuple[int, int, int], float] = {}
        self.models: list[Timing] = []
        with suppress(OSError, ValueError, KeyError, TypeError):
            raw = json.loads(path.read_text(encoding="utf-8")) if path is not None else {"operations": [], "models": []}
            operations = {(int(i), int(r), int(c)): float(ms) for i, r, c, ms in raw["operations"]}
            self.models = [Timing(**timing) for timing in raw["models"]]
            self.operations = operations

    def operation(self, number: int, sizes: tuple[int, int], ms: float) -> None:
        """One more operation."""
        self.operations[number, *sizes] = ms
        if time.monotonic() - self._written > EVERY_S:
            self._write()

    def more_models(self, timings: Sequence[Timing]) -> None:
        """Some more models."""
        self.models += timings
        self._write()

    def forget(self) -> None:
        """Remove the file: all is measured."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        if self._path is not None:
            operations = [[*key, ms] for key, ms in self.operations.items()]
            write_whole(
                self._path, json.dumps({"operations": operations, "models": [asdict(timing) for timing in self.models]})
            )
        self._written = time.monotonic()
