"""Cells of a benchmark that are kept as they come, and the points of a search that goes on where it was cut off."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from autoprune.files.job import Job
from autoprune.files.whole import write_whole
from autoprune.policy import Policy
from autoprune.run.prepare import prepare
from autoprune.run.run import Run


def read(path: Path) -> dict[str, Any]:
    """What is kept in a file of results; nothing where there is none."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def keep(path: Path, whole: Mapping[str, Any], cells: dict[str, Any], coming: Iterable[tuple[str, Any]]) -> None:
    """Put each cell that comes among `cells`, a part of the `whole` file, with the machine's load, and write that."""
    for name, cell in coming:
        cells[name] = {**cell, "load": round(os.getloadavg()[0], 1)}
        write_whole(path, json.dumps(whole, indent=1, sort_keys=True) + "\n")
        print(name, {k: v for k, v in cell.items() if k != "widths"}, flush=True)


def points(job: Job, folder: Path, shared: Path | None = None) -> dict[float, Policy]:
    """A search's point at each budget, by the held-back samples; `shared` holds what several have in common."""
    run = Run(job, folder, alone=None if shared is None else prepare(job, folder, shared=shared)).finish()
    by_id = {point.id: point.policy for point in run.front}
    rows = [row for row in run.summary if row["arm"] == "search" and row["point"] is not None]
    return {row["budget"]: by_id[row["point"]] for row in rows}
