"""Plug-ins of a user's own all the way: into policy.json, front.csv, the report, `--at` and `compare`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from autoprune.cli import run
from autoprune.comparison.comparison import compare
from autoprune.costs import build_cost
from autoprune.errors import InputError
from autoprune.files.job import Job
from autoprune.files.policy_file import load_front
from autoprune.run.prepare import prepare
from tests import plugged
from tests.synthetic import chain

ROUGH, TILTED = "tests.plugged:Rough", "tests.plugged:Tilted"
JOB: dict[str, Any] = {
    "task": {"factory": "tests.plugged:mlp"},
    "criterion": {"name": TILTED, "options": {"sign": -1}},
    "objectives": {"costs": [ROUGH]},
    "budget": {ROUGH: [0.4, 0.9], "params": 0.8, "at": [0.6]},
    "search": {"trials": 6, "window": 2},
    "evaluator": {"calibration": 32, "validation": 16, "finalists": 1, "finetune_steps": 1, "fitness": "refit"},
    "executor": {"kind": "tests.plugged:Slow", "options": {"nap_s": 0.001}},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugged")
    (folder / "job.yaml").write_text(json.dumps(JOB))
    assert run(["search", str(folder / "job.yaml"), "--out", str(folder / "run")]) == 0
    return folder


def test_a_plugged_in_cost_reaches_the_policy_file_the_table_and_the_report(finished: Path) -> None:
    front = load_front(finished / "run" / "policy.json")
    assert front.cost == ROUGH
    ratios = [point.ratio(ROUGH) for point in front]
    assert ratios == sorted(ratios)
    assert max(ratios) <= 0.9
    assert all(point.ratio("params") <= 0.8 for point in front)
    rows = list(csv.DictReader((finished / "run" / "front.csv").read_text().splitlines()))
    assert [float(row[ROUGH]) / front.base.costs[ROUGH] for row in rows] == pytest.approx(ratios)
    text = (finished / "run" / "report.html").read_text()
    assert f"<th>{ROUGH}</th>" in text
    assert f"{ROUGH} / dense".replace("/", "\\u002f") in text


def test_points_are_selected_and_applied_by_a_plugged_in_cost(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    front, arguments = load_front(finished / "run" / "policy.json"), ["--task", str(finished / "job.yaml")]
    assert front.select(f"{ROUGH}=0.6") == front.select(**{ROUGH: 0.6})
    assert front.select(f"{ROUGH}=0.6").ratio(ROUGH) <= 0.6
    out = finished / "small"
    policy = str(finished / "run" / "policy.json")
    assert run(["apply", policy, *arguments, "--at", f"{ROUGH}=0.6", "--out", str(out)]) == 0
    assert load_front(out / "policy.json")[0].ratio(ROUGH) <= 0.6
    assert run(["apply", policy, *arguments, "--at", f"{ROUGH}=0.1", "--out", str(finished / "none")]) == 2
    assert f"the least it offers is {ROUGH}=" in capsys.readouterr().err


def test_an_executors_options_reach_it_and_a_wrong_one_is_one_line(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plugged.Slow.naps > 0
    wrong = ["--set", "executor.options={nap: 1}"]
    assert run(["search", str(finished / "job.yaml"), "--out", str(finished / "no"), *wrong]) == 2
    assert "executor.options: unknown option 'nap'; did you mean 'nap_s'?" in capsys.readouterr().err


def test_a_criterions_options_are_part_of_the_policy_file_and_of_the_databases_name(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_front(finished / "run" / "policy.json").base.space["criterion"] == JOB["criterion"]
    names = {path.name for path in (finished / "run" / "database").glob("*.safetensors")}
    assert (
        run(["search", str(finished / "job.yaml"), "--out", str(finished / "run"), "--set", "criterion.options={}"])
        == 2
    )
    assert "criterion" in capsys.readouterr().err
    assert len(names) == 1
    assert (
        run(["search", str(finished / "job.yaml"), "--out", str(finished / "no"), "--set", "criterion.options.sing=2"])
        == 2
    )
    assert "criterion.options: unknown option 'sing'; did you mean 'sign'?" in capsys.readouterr().err


def test_compare_speaks_of_a_plugged_in_cost(finished: Path) -> None:
    document = compare(Job.from_dict(JOB), ("uniform", "random"), [0.6], 1, finished / "compare")
    assert document["cost"] == ROUGH
    assert all(row["loss"] > 0 for row in document["rows"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("dense = 1.0\n    def __call__(self, w): return w.sum(-1) / w.sum()", "monotone"),
        (
            "dense, monotone = 1.0, True\n    def __call__(self, w): return w.sum(-1) / 7",
            "must be 1 at the dense widths",
        ),
        (
            "dense, monotone = 0.0, True\n    def __call__(self, w): return w[..., 0] * 0.0 + 1",
            "dense must be a number",
        ),
        (
            "dense, monotone = 1.0, True\n    def __call__(self, w): return 1.0",
            "gives ratios \\[\\] for widths \\[66, 3\\]",
        ),
        (
            "dense, monotone = 1.0, True\n    def __call__(self, w): return 2 - w.sum(-1) / w.sum(-1).max()",
            "says that it is monotone, and rises where",
        ),
        (
            "dense, monotone = 1.0, True\n    def __call__(self, w): return 1 - 2 * (w.sum(-1) < w.max())",
            r"is -1 at the widths \[",
        ),
        (
            "dense, monotone = 1.0, True\n    def __call__(self, w): raise KeyError('no')",
            "KeyError: 'no'; it must be a class",
        ),
    ],
)
def test_a_cost_that_breaks_its_protocol_is_one_line_at_once(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"wrong_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"class Wrong:\n    {body}\n    def __init__(self, structure): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=message):
        build_cost(f"{name}:Wrong", chain(3))


def test_a_plugged_in_runtime_measures_and_points_of_a_latency_job_are_applied(tmp_path: Path) -> None:
    costs = {"objectives": {"costs": ["macs", "latency"]}, "budget": {"macs": [0.4, 0.9], "at": [0.6]}}
    own = {"executor": {"kind": "inline"}, "criterion": "l1_norm"}
    latency = {"runtime": "tests.plugged:stopwatch", "models": 20}
    (tmp_path / "job.yaml").write_text(json.dumps({**JOB, **costs, **own, "latency": latency}))
    job, out = str(tmp_path / "job.yaml"), str(tmp_path / "run")
    assert run(["search", job, "--out", out]) == 0
    front = load_front(tmp_path / "run" / "policy.json")
    assert front.measured_on["runtime"] == "tests.plugged:stopwatch"
    fastest = min(point.ratio("latency") for point in front)
    at = f"latency={fastest + 1e-6}"
    assert run(["apply", f"{out}/policy.json", "--task", job, "--at", at, "--out", str(tmp_path / "small")]) == 0


def test_one_latency_table_serves_the_same_job_at_every_seed(tmp_path: Path) -> None:
    given = {
        **{key: JOB[key] for key in ("task", "evaluator")},
        "criterion": "l1_norm",
        "objectives": {"costs": ["latency"]},
        "budget": {"latency": [0.1, 1.0], "at": [0.6]},
        "latency": {"runtime": "tests.plugged:stopwatch", "models": 20},
        "executor": {"kind": "inline"},
    }
    tables = [
        prepare(Job.from_dict({**given, "search": {"trials": 6, "seed": seed}}), tmp_path).latency for seed in (0, 1)
    ]
    assert tables[0] == tables[1]
    assert len(list(tmp_path.glob("**/latency-*.json"))) == 1
