"""`autoprune front`: a front again, as a table, and what to type next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoprune.cli.options import JsonFlag
from autoprune.cli.tables import console, print_columns
from autoprune.errors import InputError

if TYPE_CHECKING:
    from autoprune.front import Front, Point

JOB = "job.yaml"


def front(
    policy: Annotated[Path, typer.Argument(metavar="POLICY.json|RUN_DIR", help="A front, or the folder of a search.")],
    json_: JsonFlag = False,
    csv_: Annotated[bool, typer.Option("--csv", help="The rows of front.csv on stdout: widths too.")] = False,
) -> dict[str, Any] | None:
    """Show a front again: costs as ratios to dense, loss and metrics on validation, before and after the fine-tune."""
    from autoprune.files.policy_file import csv_text, load_front, policy_path

    if json_ and csv_:
        raise InputError("--json and --csv: say one of the two")
    file = policy_path(policy)
    found = load_front(file)
    if json_:
        return _document(file, found)
    if csv_:
        print(csv_text(found), end="")
        return None
    _print(file, found)
    return None


def _document(file: Path, found: Front) -> dict[str, Any]:
    """What --json says: absolute costs and their ratios to dense, and every figure of each point."""
    dense = {"costs": dict(found.base.costs), "metrics": {k: dict(v) for k, v in found.base.metrics.items()}}
    return {
        "file": str(file),
        "model": found.base.model,
        "cost": found.cost,
        "dense": dense,
        "points": [_plain(point) for point in found],
        "next": list(_next(file, found)),
    }


def _plain(point: Point) -> dict[str, Any]:
    from autoprune.front_table import ratio_of

    return {
        "id": point.id,
        "ratios": {c: ratio for c in (*point.base.costs, "latency") if (ratio := ratio_of(point, c)) is not None},
        "costs": dict(point.costs),
        "losses": _dicts(point.losses),
        "metrics": _dicts(point.metrics),
        "finetuned": dict(point.finetuned),
        "widths": point.policy.as_dict(),
    }


def _dicts(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: dict(values) for name, values in tables.items()}


def _print(file: Path, found: Front) -> None:
    from autoprune.front_table import figure, front_table

    table = front_table(found)
    title = f"{len(found)} points of {found.base.model}: costs as ratios to dense, the rest on validation"
    print_columns(title, ("point", *table.headings), [(name, *map(figure, row)) for name, row in table.rows])
    out = console()
    for line in _next(file, found):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _next(file: Path, found: Front) -> Sequence[str]:
    """What to type next, of the point at the knee; in Python where the task was lent from there."""
    if not len(found):
        return ["the front holds no point: search again over a wider budget"]
    knee = found.select("knee")
    limit = math.ceil(100 * knee.ratio(found.cost)) / 100
    drop = ", drop=0.01" if found.base.metrics.get("validation") else ""
    said = f"{knee.id} is the knee; --at also takes another id, {found.cost}={limit:g}{drop}"
    if not found.base.task:
        call = f'autoprune.apply(autoprune.load_front("{file}").select("{knee.id}"), model, inputs, task=task)'
        return [said.replace("--at", "select"), f"next, in Python, as the file names no task: {call}"]
    job = file.parent / JOB
    task = shlex.quote(str(job)) if job.exists() else "JOB.yaml"
    return [said, f"next: autoprune apply {shlex.quote(str(file))} --task {task} --at {knee.id} --out small"]
