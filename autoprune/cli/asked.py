"""What was asked on the command line, as values: jobs, keys of a job, lists, times and ratios."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.errors import InputError

if TYPE_CHECKING:
    from autoprune.files.job import Job

UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}


def load_job(path: Path, overrides: Sequence[str] | None) -> Job:
    """The job in a file, with the keys that --set changes; InputError where it is none."""
    from autoprune.files.job import Job

    return Job.load(path, overrides or ())


def where(workers: int | None, ray: str | None, time_limit: str | None) -> dict[str, object]:
    """The keys of a job that say where, and how long, it searches."""
    return {
        "executor.workers": workers,
        **({} if ray is None else {"executor.kind": "ray", "executor.address": json.dumps(ray)}),
        "search.time_limit_s": None if time_limit is None else seconds(time_limit),
    }


def overrides(flags: Mapping[str, object]) -> list[str]:
    """Keys of a job as --set takes them, of those flags that were given."""
    return [f"{key}={value}" for key, value in flags.items() if value is not None]


def words(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def seconds(text: str) -> float:
    """90, 90s, 10m or 2h in seconds."""
    unit = text[-1:] if text[-1:] in UNITS_S else "s"
    number = text.removesuffix(unit)
    try:
        return float(number) * UNITS_S[unit]
    except ValueError:
        raise InputError(f"--time-limit takes a time such as 90s, 10m or 2h, not {text!r}") from None


def ratio(text: str) -> float:
    """A ratio to dense of --budgets."""
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--budgets takes ratios with commas, as in 0.7,0.5,0.3, not {text!r}") from None
