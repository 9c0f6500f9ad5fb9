"""`apply` is killed amid its training, twice; the same command goes on inside it, to the very same weights."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from autoprune.application.checkpoints import POINTER
from autoprune.cli import progress, run
from autoprune.files.job import Job
from autoprune.files.policy_file import load_front
from tests.conftest import autoprune_process, until

RECOVERY = {
    "schedule": "iterative",
    "options": {"rounds": 2, "learning_rate": 0.01, "ema": 0.99, "checkpoint_every": 1, "scorings": 2, "epochs": 4},
}


def kept(folder: Path) -> Mapping[str, Any]:
    """What the checkpoint says, nothing where there is none."""
    try:
        found: Mapping[str, Any] = json.loads((folder / POINTER).read_text())["facts"]
    except FileNotFoundError:
        return {}
    return found


def test_the_same_command_goes_on_wherever_its_training_was_killed(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    front = finished_run / "runs" / "digits"
    job = Job.load(front / "job.yaml").plain() | {"recovery": RECOVERY}
    (tmp_path / "job.yaml").write_text(Job.from_dict(job).dump())
    at = load_front(front / "policy.json")[0].id
    command = ("apply", str(front / "policy.json"), "--task", str(tmp_path / "job.yaml"), "--at", at)
    command = (*command, "--finetune", "full", "--out")
    assert run([*command, str(tmp_path / "whole")]) == 0
    place, small = tmp_path / ".small.training", tmp_path / "small"
    for part in (0, 1):
        process = autoprune_process(*command, str(small), cwd=tmp_path)
        try:
            until(lambda: process.poll() is not None or kept(place).get("part", -1) >= part, 120)  # noqa: B023
        finally:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert kept(place)["part"] == part
        assert not small.exists(), "a folder is written whole or not at all"
    capsys.readouterr()
    monkeypatch.setattr(progress, "LONG_S", 0.0)
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    assert run([*command, str(small)]) == 0
    said = capsys.readouterr().out
    assert "statistics: " in said
    assert " steps, " in said.split("training: ")[-1]
    assert not place.exists()
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "small"))
    assert all(bool((value == again[name]).all()) for name, value in whole.items())
    facts = [json.loads((tmp_path / name / "apply.json").read_text()) for name in ("whole", "small")]
    assert facts[0]["course"] == facts[1]["course"]
    assert facts[0]["recipe"] == facts[1]["recipe"]
    assert facts[0]["recipe"]["epochs"] == 4
    assert set(facts[0]["course"]["before"]["metrics"]) == set(facts[0]["validation"]["metrics"])
    assert "validation before training" in (small / "README.md").read_text()
