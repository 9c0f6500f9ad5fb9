"""Whoever looks on at `apply` sees its stages, how far the training is, and about how long it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoprune.application.order import Order
from autoprune.application.training import Training
from autoprune.application.under_way import UnderWay
from autoprune.errors import InputError
from autoprune.files.job import Job
from autoprune.files.policy_file import load_front


def test_the_stages_follow_each_other_and_a_training_counts_its_steps(finished_run: Path, tmp_path: Path) -> None:
    folder = finished_run / "runs" / "digits"
    policy, job = folder / "policy.json", Job.load(folder / "job.yaml")
    points = [p.id for p in load_front(policy)][:2]
    training = Training("full", 1.0, "one_shot", {"learning_rate": 0.01})
    call = UnderWay(policy, job, points, tmp_path / "small", Order(training=training))
    stages, counted, left = list[str](), list[str](), list[float | None]()
    for _ in call:
        if not stages or stages[-1] != call.stage:
            stages.append(call.stage)
        if call.stage == f"{points[0]}: training":
            counted.append(call.counted)
            left.append(call.left_s)
            assert 0 < call.done <= call.total
    wanted = ["analysis", "data", "statistics", "ranking", "repair", "scores", "training", "scores", "verification"]
    wanted += ["test split and latency", "exports"]
    assert stages == [f"{p}: {s}" for p in points for s in wanted]
    steps = len(counted)
    assert counted == [f"{n} of {steps} steps" for n in range(1, steps + 1)]
    assert left[-1] == pytest.approx(0.0)
    assert all(seconds is not None and seconds > 0 for seconds in left[1:-1])
    assert set(call.report["points"]) == set(points)
    for point in points:
        assert call.report["points"][point] == json.loads((tmp_path / "small" / point / "apply.json").read_text())


def test_what_is_wrong_is_said_when_it_is_driven(finished_run: Path, tmp_path: Path) -> None:
    policy = finished_run / "runs" / "digits" / "policy.json"
    with pytest.raises(InputError, match="no point"):
        list(UnderWay(policy, Job.load(policy.parent / "job.yaml"), "p99", tmp_path / "small"))
