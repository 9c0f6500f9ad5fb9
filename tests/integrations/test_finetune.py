"""The finalists' long fine-tuning on a real Ray: recipes, early stops, checkpoints, a kill, and what is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from autoprune.application.courses import Attempt, Plan, Tuition, planned, recipes
from autoprune.errors import InputError, RunError
from autoprune.evaluation import Ask
from autoprune.files.job import Job
from autoprune.files.job_parts import FinetunePart
from autoprune.files.policy_file import load_front
from autoprune.integrations import finetune
from autoprune.integrations.finetune import ByPoint, finetune_front
from autoprune.run.run import Run, search
from autoprune.run.setting import Setting
from tests.conftest import RAY, autoprune_process

pytestmark = [RAY, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]

JOB: dict[str, Any] = {
    "task": {"name": "digits"},
    "budget": {"macs": [0.3, 0.9], "at": [0.6, 0.4]},
    "search": {"trials": 4, "seed": 3, "sampler": "random"},
    "evaluator": {"calibration": 64, "validation": 80, "fitness": "stitch", "sensitivity": 0, "finalists": 0},
    "executor": {"kind": "inline", "workers": 1},
    "finetune": {"points": 2, "samples": 4, "epochs": [2, 3], "learning_rate": [0.005, 0.02]},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return search(Job.from_dict(JOB), out=tmp_path_factory.mktemp("run")).finish()


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """The finished search in a folder of its own."""
    shutil.copytree(finished.path, tmp_path / "run")
    return search(Job.from_dict(JOB), out=tmp_path / "run").finish()


@pytest.mark.usefixtures("cluster")
def test_the_best_recipe_of_each_point_is_scored_kept_and_told(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    rows = finetune_front(run, said.append)
    assert capfd.readouterr().out == ""
    assert len(rows) == 2
    assert len([line for line in said if "held-back loss" in line]) == 4
    found = json.loads((run.path / "finetune.json").read_text())
    assert {t["point"] for t in found["trials"]} == {row["point"] for row in rows}
    assert not any("error" in t for t in found["trials"])
    evaluator: Any = run.setting.evaluator_factory()()
    front = load_front(run.path / "policy.json")
    for row in rows:
        point = front.select(row["point"])
        assert row["better"]  # as the brief fine-tune was left out
        assert point.loss("finetuned") == row["losses"]["validation"]["loss"]
        assert point.finetuned == row["recipe"]
        assert row["losses"]["validation"]["loss"] < point.loss()
        model = evaluator.stitcher.stitch(point.policy)
        model.load_state_dict(load_file(run.path / "finetuned" / f"{point.id}.safetensors"))
        evaluator.stitcher.mark_dirty()
        assert evaluator.standing("validation").loss == pytest.approx(row["losses"]["validation"]["loss"], rel=1e-4)
    monkeypatch.setattr(finetune, "_tuned", lambda *_: pytest.fail("nothing may be repeated"))
    again = search(Job.from_dict(JOB), out=run.path).finish()  # which writes policy.json anew
    assert list(finetune_front(again)) == list(rows)
    assert load_front(run.path / "policy.json").points == front.points


@pytest.mark.usefixtures("cluster")
def test_where_every_trial_fails_the_reason_is_said_and_the_run_stays(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("no data on this machine")

    one = {**JOB, "finetune": {"points": 1, "samples": 1}}
    run = search(Job.from_dict(one), out=run.path).finish()
    before = (run.path / "policy.json").read_bytes()
    monkeypatch.setattr(Setting, "evaluator_factory", lambda self: broken)
    with pytest.raises(RunError, match=r"all 1 fine-tuning trials failed; the first: .*no data on this machine"):
        finetune_front(run)
    assert (run.path / "policy.json").read_bytes() == before
    assert not (run.path / "finetune.json").exists()


def test_killed_it_goes_on_from_its_checkpoints_and_repeats_nothing_that_was_finished(run: Run, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(Job.from_dict(JOB).dump())
    command = ("search", str(job), "--out", run.path.name)  # relative, as by default
    first = autoprune_process(*command, cwd=tmp_path)
    deadline = time.monotonic() + 200
    while len(_states(run.path)) < 3 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)  # Tune writes what it knows about its trials once a second
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert not (run.path / "finetune.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in _states(run.path)}
    assert kept
    second = autoprune_process(*command, cwd=tmp_path)
    output, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert "best recipe of each point" in output
    assert "Traceback" not in errors
    (experiment,) = (run.path / "tune").iterdir()
    assert len([p for p in experiment.iterdir() if p.is_dir()]) == 4
    finished_before = [path for path, when in kept.items() if path.exists() and path.stat().st_mtime_ns == when]
    assert finished_before
    trials = json.loads((run.path / "finetune.json").read_text())["trials"]
    assert len(trials) == 4
    assert not any("error" in t for t in trials)


def _states(folder: Path) -> list[Path]:
    return sorted((folder / "tune").glob("*/*/checkpoint_*/course.pt"))


def test_a_tuition_goes_on_from_its_checkpoint_to_the_bit(finished: Run, tmp_path: Path) -> None:
    trial, policy = Attempt("p00", 2, 0.01, 0.7), finished.front[0].policy
    whole, broken = (finished.setting.evaluator_factory()() for _ in range(2))
    uninterrupted = Tuition(whole, policy, trial)
    losses = [uninterrupted.advance(), uninterrupted.advance()]
    first = Tuition(broken, policy, trial)
    assert first.advance() == losses[0]
    first.save(tmp_path)
    broken.repaired(Ask(finished.front[-1].policy, "refit"))  # the model is someone else's for a while
    second = Tuition(broken, policy, trial)
    second.load(tmp_path)
    assert not second.done
    assert second.advance() == losses[1]
    assert second.done
    for name, value in whole.stitcher.model.state_dict().items():
        assert torch.equal(broken.stitcher.model.state_dict()[name], value), name


def planned_of(run: Run, section: FinetunePart) -> Plan:
    s = run.setting
    return planned(run.front, section, s.problem.budget, s.task, identity=s.identity, settings=s.settings)


def test_recipes_spread_over_their_ranges_and_points_take_turns(finished: Run) -> None:
    section = FinetunePart(points=2, samples=9, epochs=(1, 4))
    row = recipes("p00", section, (0.01, 0.1), 4, (0, 0))
    assert sorted(t.epochs for t in row) == [1, 2, 3, 4]
    assert all(0.01 <= t.learning_rate <= 0.1 and 0.5 <= t.distillation <= 1.0 for t in row)
    plan = planned_of(finished, section)
    turns = [t.point for t in plan.attempts]
    assert len(set(turns[:2])) == 2
    assert turns == [turns[0], turns[1]] * 4 + [turns[0]]
    assert plan == planned_of(finished, section)
    assert plan.key != planned_of(finished, FinetunePart(points=2, samples=8)).key


def test_asha_compares_the_recipes_of_one_point_at_the_same_share_of_their_schedules() -> None:
    scheduler = ByPoint()
    trials = [SimpleNamespace(trial_id=str(i), config={"trial": {"point": p}}) for i, p in enumerate("aab")]
    for trial in trials:
        scheduler.on_trial_add(None, trial)
    results = [{"loss": loss, "progress": 50.0} for loss in (0.1, 0.2, 9.0)]
    decisions = [scheduler.on_trial_result(None, t, r) for t, r in zip(trials, results, strict=True)]
    assert decisions == ["CONTINUE", "STOP", "CONTINUE"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"epochs": [3, 2]}, r"finetune: epochs must be a range \[low, high\], not \[3, 2\]"),
        ({"epoch": [1, 2]}, r"unknown key 'finetune\.epoch'; did you mean 'epochs'"),
        ({"points": 4, "samples": 3}, "finetune: samples must be at least points"),
        ({"distillation": [0.0, 1.5]}, r"finetune\.distillation\.1"),
        ({"learning_rate": [0.0, 0.1]}, r"finetune\.learning_rate\.0"),
    ],
)
def test_a_wrong_section_names_its_key(section: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Job.from_dict({**JOB, "finetune": section})


def test_the_section_may_come_and_change_but_must_be_there(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    plain = {k: v for k, v in JOB.items() if k != "finetune"}
    without = search(Job.from_dict(plain), out=tmp_path / "run").finish()
    with pytest.raises(InputError, match="the job has no finetune section"):
        finetune_front(without)
