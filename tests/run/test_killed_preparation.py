"""A search is killed again and again while it is prepared; the same command goes on, and nothing is lost on the way."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from autoprune.cli import run
from autoprune.files.policy_file import load_front
from tests.conftest import autoprune_process
from tests.killable_compare import tiny_job

JOB: dict[str, Any] = {
    "search": {"trials": 4, "sampler": "evolution"},
    "evaluator": {"finalists": 1, "finetune_steps": 3},
    "executor": {"kind": "inline"},
}
MOMENTS = ("analysis-*.json", "*.parts/made-of-0001.safetensors", "*.safetensors", "*.rate.json", "*.sensitivity.json")
"""Files of the database folder; a process is killed as soon as it has left one."""


def figures(folder: Path) -> list[Any]:
    return [(p.policy, dict(p.costs), dict(p.metrics["validation"])) for p in load_front(folder / "policy.json")]


def killed(command: tuple[str, ...], database: Path, left: str, cwd: Path) -> None:
    """Run until the database folder holds a file called like `left`, then kill -9; one that is through is let go."""
    process = autoprune_process(*command, cwd=cwd)
    deadline = time.monotonic() + 120
    while process.poll() is None and not list(database.glob(left)):
        assert time.monotonic() < deadline, f"no {left} came"
        time.sleep(0.002)
    process.kill()
    process.communicate()


def test_the_same_command_goes_on_wherever_a_preparation_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text(tiny_job(**JOB).dump())
    whole = ("search", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "whole"))
    command = (*whole[:-1], str(tmp_path / "killed"))
    assert run([*whole]) == 0
    database, seen = tmp_path / "killed" / "database", {}
    for moment in MOMENTS:
        killed(command, database, moment, tmp_path)
        for path, written in seen.items():  # what one call has left, the next one does not make again
            assert path.stat().st_mtime_ns == written or path.parent != database
        seen = {p: p.stat().st_mtime_ns for p in database.glob("*") if p.suffix in (".json", ".safetensors")}
    assert run([*command]) == 0
    assert capsys.readouterr().err.count("needs about") == 2
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")
    assert len(list(database.glob("analysis-*.json"))) == 1
