"""A whole comparison of a tiny model in a process of its own, to be killed: FOLDER LOG (see test_compare.py)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from autoprune.comparison.comparison import Comparison
from autoprune.files.job import Job
from tests.families import FAMILIES
from tests.small import RandomTask

STRATEGIES, BUDGETS, SEEDS = ("uniform", "global", "random"), (0.6, 0.4), (0, 1)
JOB: dict[str, Any] = {
    "task": {"factory": "tests.killable_compare:tiny"},
    "space": {"max_sparsity": 0.9},
    "budget": {"macs": [0.3, 0.9], "at": [0.6]},
    "search": {"trials": 8, "sampler": "random", "window": 4},
    "evaluator": {"calibration": 64, "validation": 32, "finalists": 0, "fitness": "refit", "sensitivity": 2},
    "executor": {"kind": "inline"},
}


def tiny() -> RandomTask:
    """A small convolutional network over random inputs; its weights are the same at every call."""
    family = FAMILIES["plain"]
    return RandomTask(family.build().eval(), family.shape)


def tiny_job(**changes: Any) -> Job:
    """JOB with some sections updated."""
    merged = {k: {**v, **changes.get(k, {})} if isinstance(v, dict) else v for k, v in JOB.items()}
    return Job.from_dict({**changes, **merged})


def main(folder: Path, log: Path) -> None:
    """Compare to the end; every evaluation that really ran in this process is a line of `log`."""
    comparison = Comparison(tiny_job(), STRATEGIES, BUDGETS, SEEDS, folder)
    for _ in comparison:
        with log.open("a") as file:
            file.write(f"{comparison.stage}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
