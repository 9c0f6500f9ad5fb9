"""What a latency job goes by: threads, the runtime's steps, its table; and every place that shows what was measured."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from autoprune.application.delivery import apply_file
from autoprune.application.order import Order
from autoprune.application.training import Training
from autoprune.cli import run
from autoprune.cli.tables import time_notes
from autoprune.errors import InputError
from autoprune.files.job import Job
from autoprune.files.machine import usable_cores
from autoprune.files.policy_file import load_front
from autoprune.run.prepare import prepare
from autoprune.run.run import Run, search
from autoprune.run.timed import clocked_of, runtime_step, step_words
from tests.plugged import Stepped

STEPPED = "tests.plugged:Stepped"
CPU = torch.device("cpu")
JOB: dict[str, Any] = {
    "task": {"factory": "tests.plugged:convolving"},
    "criterion": "l1_norm",
    "objectives": {"costs": ["macs", "latency"]},
    "budget": {"macs": [0.2, 0.9], "at": [0.5]},
    "search": {"trials": 4, "sampler": "random"},
    "evaluator": {
        **{"calibration": 32, "validation": 16, "finalists": 0, "finetune_steps": 0},
        **{"sensitivity": 0, "fitness": "stitch"},
    },
    "executor": {"kind": "inline"},
    "latency": {"runtime": STEPPED, "models": 20},
}
EIGHTS = (8, 16, 24, 32)


def job(**sections: Any) -> Job:
    return Job.from_dict({**JOB, **sections})


def went(folder: Path, trials: int = 4, **sections: Any) -> Run:
    return search(job(search={**JOB["search"], "trials": trials}, **sections), out=folder).finish()


def grids(run: Run) -> set[tuple[int, ...]]:
    return {group.grid for group in run.setting.structure}


def test_a_search_for_latency_has_the_steps_of_its_runtime_where_the_job_leaves_them_open() -> None:
    assert runtime_step(job(), CPU) == 8
    assert runtime_step(job(objectives={"costs": ["macs"]}), CPU) == 1
    limit = {"objectives": {"costs": ["macs"]}, "budget": {"macs": [0.2, 0.9], "latency": 0.9, "at": [0.5]}}
    assert runtime_step(job(**limit), CPU) == 8
    assert runtime_step(job(space={"multiple_of": 1}), CPU) == 1
    assert runtime_step(job(space={"multiple_of": 1, "overrides": {"2": {"multiple_of": "auto"}}}), CPU) == 8
    assert runtime_step(job(latency={"runtime": "eager"}), CPU) == 1
    assert "multiples of 8, in which tests.plugged:Stepped computes here" in step_words(job(), 8)
    assert step_words(job(), 1) == ""


@pytest.mark.parametrize("wrong", [0, "many", True, 2.0])
def test_a_step_that_is_none_names_the_runtime(wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stepped, "step", wrong)
    with pytest.raises(InputError, match=f"tests.plugged:Stepped has the step {wrong!r}; it must be a whole number"):
        runtime_step(job(), CPU)


def test_inspect_shows_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text(json.dumps(JOB))
    assert run(["inspect", str(tmp_path / "job.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "8..32 (4)" in shown
    assert "multiples of 8" in shown
    assert run(["inspect", str(tmp_path / "job.yaml"), "--set", "objectives.costs=[macs]"]) == 0
    assert "4..32 (29)" in capsys.readouterr().out


def test_a_run_goes_on_with_the_grids_and_the_table_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stepped, "step", 1)  # as an earlier version, which knew of no steps
    begun, fine = went(tmp_path / "old"), {tuple(range(4, 33))}
    assert grids(begun) == fine
    assert "step" not in begun.setting.identity
    monkeypatch.setattr(Stepped, "step", 8)
    monkeypatch.setattr("autoprune.plugins.source_digest", lambda plugin: "another source")
    again = went(tmp_path / "old", 6)
    assert grids(again) == fine
    assert again.setting.latency == begun.setting.latency
    assert len(list((tmp_path / "old" / "database").glob("latency-*.json"))) == 1
    fresh = went(tmp_path / "new")
    assert grids(fresh) == {EIGHTS}
    assert (fresh.setting.identity["step"], fresh.setting.job.sha256) == ("8", begun.setting.job.sha256)
    monkeypatch.setattr(Stepped, "step", 4)  # a machine with shorter vectors
    assert grids(went(tmp_path / "new", 6)) == {EIGHTS}


def test_more_threads_than_cores_are_told_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text(json.dumps({**JOB, "latency": {"threads": 10_000}}))
    cores = usable_cores()
    for arguments in (["search"], ["compare"], ["inspect", "--sensitivity"]):
        assert run([*arguments, str(tmp_path / "job.yaml"), "--out", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"latency.threads: 10000 threads, but this process may use {cores} core" in said
    with pytest.raises(InputError, match=r"latency\.threads: 10000 threads"):
        clocked_of(job(latency={"threads": 10_000}))


@pytest.mark.skipif(usable_cores() < 2, reason="one core")
def test_two_threads_are_used_wherever_latency_is_measured_and_said(tmp_path: Path) -> None:
    Stepped.threads.clear()
    before = torch.get_num_threads()
    two = {"latency": {**JOB["latency"], "threads": 2}, "task": {"factory": "tests.plugged:mlp"}}
    run_ = went(tmp_path / "run", **two)
    assert run_.setting.latency is not None
    assert run_.setting.latency.threads == 2
    assert "2 threads" in run_.setting.latency.verdict()
    assert load_front(tmp_path / "run" / "policy.json").measured_on["threads"] == 2
    policy = tmp_path / "run" / "policy.json"
    facts = apply_file(policy, job(**two), "macs=0.9", tmp_path / "small", Order(training=Training.of("none", None)))
    assert (facts["latency"]["threads"], facts["latency"]["runtime"]) == (2, STEPPED)
    assert f"({STEPPED}, batch 1, 2 threads)" in (tmp_path / "small" / "README.md").read_text()
    assert Stepped.threads == {2}
    assert torch.get_num_threads() == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timed")
    (folder / "job.yaml").write_text(json.dumps(JOB))
    return folder


def searched(folder: Path) -> Path:
    if not (folder / "run" / "policy.json").exists():
        assert run(["search", str(folder / "job.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def rows_of(out: Path) -> list[Mapping[str, Any]]:
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return list(next(e["rows"] for e in reversed(events) if e["event"] == "summary"))


def test_every_arm_at_a_budget_has_its_measured_latency_and_where_the_rest_goes(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = searched(finished)
    shown = capsys.readouterr().out
    rows = rows_of(out)
    assert {row["arm"] for row in rows} == {"search", "uniform", "global"}
    for row in rows:
        assert set(row["latency"]) == {"ratio", "iqr", "fixed", "untouched", "written", "narrowed"}
        assert row["rest"].startswith(f"{row['macs_ratio']:.2f} of the MACs take {row['latency']['ratio']:.2f} of the")
    (ours,) = (row for row in rows if row["arm"] == "search")
    assert time_notes(rows) == [ours["rest"]]
    heading = next(line for line in shown.splitlines() if "budget" in line and "MACs" in line)
    assert heading.split("MACs")[1].split()[1] == "latency"
    assert heading.count("latency") == 1
    assert f"{ours['latency']['ratio']:.4g}" in shown
    assert ours["rest"] in shown


def test_the_policy_file_its_table_and_the_report_hold_the_measured_latency(finished: Path) -> None:
    out = searched(finished)
    front = load_front(out / "policy.json")
    on = front.measured_on
    assert (on["threads"], on["runtime"], on["batch_size"]) == (1, STEPPED, 1)
    assert sum(on["latency"].values()) == pytest.approx(1.0, abs=1e-3)
    table = list(csv.DictReader((out / "front.csv").read_text().splitlines()))
    assert [float(row["latency.ratio"]) for row in table] == [point.ratio("latency") for point in front]
    assert all(float(row["latency.fixed"]) >= 0 for row in table)
    text = (out / "report.html").read_text()
    (ours,) = (row for row in rows_of(out) if row["arm"] == "search")
    assert "<th>MACs</th><th>latency</th><th>loss</th>" in text
    assert ours["rest"].replace(">", "&gt;") in text
    assert f"latency {front[0].ratio('latency'):.2f}" in text


def test_the_card_and_apply_say_where_the_time_goes_by_the_table_of_the_search(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = searched(finished)
    capsys.readouterr()
    given = [str(out / "policy.json"), "--task", str(finished / "job.yaml"), "--at", "macs=0.9", "--finetune", "none"]
    assert run(["apply", *given, "--out", str(tmp_path / "small")]) == 0
    facts = json.loads((tmp_path / "small" / "apply.json").read_text())
    dense, pruned = facts["latency"]["parts"]["dense"], facts["latency"]["parts"]["pruned"]
    assert dense == load_front(out / "policy.json").measured_on["latency"]
    assert set(pruned) == set(dense)
    card, shown = (tmp_path / "small" / "README.md").read_text(), capsys.readouterr().out
    for text in (card, shown):
        assert f"{facts['macs_ratio']:.1%} of its multiply-accumulates, {facts['latency']['ratio']:.0%} of its" in text
        assert "by the latency table, in shares of the dense time: operations that groups narrow" in text
    eager = {**JOB, "latency": {"runtime": "eager"}}
    (finished / "eager.yaml").write_text(json.dumps(eager))
    given[2] = str(finished / "eager.yaml")
    assert run(["apply", *given, "--out", str(tmp_path / "other")]) == 0
    text = (tmp_path / "other" / "README.md").read_text()
    assert "by the latency table" not in text, "that one was of another runtime"
    assert "the difference is what does not shrink with them" in text


def test_compare_shows_the_measured_latency_of_every_arm(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = finished / "compare"
    arms = ["--strategies", "uniform,random", "--seeds", "1", "--out", str(out)]
    assert run(["compare", str(finished / "job.yaml"), *arms]) == 0
    shown = capsys.readouterr().out
    document = json.loads((out / "compare.json").read_text())
    assert all(row["latency_ratio"] > 0 for row in document["summary"])
    assert "latency" in next(line for line in shown.splitlines() if "strategy" in line)
    assert document["rest"] in shown
    rows = list(csv.DictReader((out / "compare.csv").read_text().splitlines()))
    assert [float(row["latency_ratio"]) for row in rows] == [row["latency_ratio"] for row in document["rows"]]
    text = (out / "compare.html").read_text()
    assert "<th>latency</th>" in text
    assert "of the MACs take" in text


def test_one_setting_of_a_job_without_a_latency_is_as_it_was(tmp_path: Path) -> None:
    plain = job(objectives={"costs": ["macs"]}, latency={})
    setting = prepare(plain, tmp_path)
    assert (setting.step, setting.latency) == (1, None)
    assert {g.grid for g in setting.structure} == {tuple(range(4, 33))}
