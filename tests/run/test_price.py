"""The price of a container: both sides really measured on the same samples, in the table, the report and the files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoprune.cli import run as cli
from autoprune.deploy import joined, searched
from autoprune.errors import OutOfTimeError
from autoprune.evaluation import Ask, Evaluation
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.files.job import Job
from autoprune.files.policy_file import load_front
from autoprune.policy import Policy
from autoprune.record.record import Record
from autoprune.report.read import read_trials
from autoprune.run import price
from autoprune.run import run as rooms
from autoprune.run.prepare import prepare
from autoprune.run.run import Run, search
from autoprune.space import Space
from autoprune.structure import Structure
from tests.deploy.decoders import analysed
from tests.run.test_time_limit import Few

HALF = "tests.plugged:Half"
EVALUATOR = {"calibration": 32, "validation": 16, "finalists": 1, "finetune_steps": 2, "fitness": "refit"}
JOB: dict[str, Any] = {
    "task": {"factory": "tests.plugged:mlp"},
    "budget": {"macs": [0.7, 0.95], "at": [0.9, 0.75]},
    "search": {"trials": 40, "window": 2},
    "evaluator": EVALUATOR,
    "executor": {"kind": "inline"},
    "deploy": HALF,
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return search(JOB, out=tmp_path_factory.mktemp("priced")).finish()


def test_both_sides_are_the_same_allocation_and_the_price_is_their_difference(done: Run) -> None:
    assert [(row["budget"], row["arm"], row["container"]) for row in done.price] == [
        (0.9, "knapsack", HALF),
        (0.75, "knapsack", HALF),
    ]
    for row in done.price:
        within, whole = row["within"], row["whole"]
        assert row["tier"] == "tune"
        assert row["price"] == within["tuned_loss"] - whole["tuned_loss"]
        assert row["low"] <= row["price"] <= row["high"]
        assert max(side["costs"]["macs"] for side in (within, whole)) <= row["budget"] + 1e-9
        assert f"knapsack has {within['tuned_loss']:.4g} in it and {whole['tuned_loss']:.4g} in onnx" in row["text"]
    assert done.price[1]["price"] > 0  # of the first layer, half of the work, nothing may go


def test_the_other_side_is_what_an_unrestricted_search_would_measure(done: Run, tmp_path: Path) -> None:
    s = prepare(Job.from_dict({**JOB, "deploy": None}), tmp_path)
    with Record(done.path / "price", s.structure, ("macs",), "refit", s.identity) as record:
        final = {record.labels[key]: e for key, e in record.evaluations.items() if key[0] == "final"}
    evaluator = TieredEvaluator(s.task, s.structure, s.database, s.settings, parts=s.parts)
    for row in done.price:
        policy = final[f"knapsack@{row['budget']:g}"].ask.policy
        again = evaluator(Ask(policy, "refit", split="validation"))
        assert again.loss == pytest.approx(row["whole"]["loss"], rel=1e-4)
        assert policy.as_dict()[s.structure.names[0]] < s.structure.groups[0].width


def test_rows_of_the_table_that_the_container_leaves_as_they_are_are_not_measured_again(done: Run) -> None:
    s = done.setting
    whole = price.without_container(s)
    assert whole is not None
    first, second = whole.structure.names
    assert [g.name for g in s.structure] == [second]
    plan = price.affordable(s, whole, done._tabled)  # type: ignore[arg-type]
    asked = price.missing_asks(s, whole, plan)
    assert {label.partition("=")[0] for label, _ in asked} == {first}
    assert whole.worth(ask for _, ask in asked) <= 0.25 * 40
    assert done.spent[price.TABLE] == pytest.approx(whole.worth(ask for _, ask in asked))
    assert s.problem.table is not None
    table = price.joined_table(s, whole, [])
    assert table[second] == s.problem.table[second]
    assert table[first] == {whole.structure.group(first).width: s.problem.table[second][16]}


def test_it_stands_in_the_table_the_report_and_the_policy_file(done: Run) -> None:
    arms = [row["arm"] for row in done.summary if row["budget"] == 0.9]
    assert arms[-2:] == [f"knapsack in {HALF}", "knapsack in onnx"]
    assert all(row["beat"] is None for row in done.summary if " in " in row["arm"])
    page = (done.path / "report.html").read_text()
    for row in done.price:
        assert row["text"].replace("'", "&#x27;") in page
    told = load_front(done.path / "policy.json").provenance["price"]
    assert json.loads(json.dumps(told)) == json.loads(json.dumps([dict(row) for row in done.price]))


def test_the_same_command_measures_nothing_again_and_says_the_same(
    done: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text(json.dumps(JOB))
    before = read_trials(done.path / "price" / "study.journal")
    assert cli(["search", str(tmp_path / "job.yaml"), "--out", str(done.path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["price"] == json.loads(json.dumps([dict(row) for row in done.price]))
    assert read_trials(done.path / "price" / "study.journal") == before


def test_a_container_that_holds_everything_has_no_price(tmp_path: Path) -> None:
    run = search({**JOB, "deploy": "onnx", "search": {"trials": 4}}, out=tmp_path).finish()
    assert run.price == ()
    assert run.setting.whole is None
    assert not (tmp_path / "price").exists()


def test_without_a_table_the_last_control_arm_is_compared(tmp_path: Path) -> None:
    quick = {**EVALUATOR, "sensitivity": 0, "finalists": 0}
    job = {**JOB, "evaluator": quick, "search": {"trials": 4, "sampler": "random"}}
    run = search(job, out=tmp_path).finish()
    assert [row["arm"] for row in run.price] == ["global", "global"]
    assert all(row["tier"] == "refit" for row in run.price)
    assert all(row["price"] == row["within"]["loss"] - row["whole"]["loss"] for row in run.price)


def test_a_time_limit_ends_it_with_the_front_on_disk_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = rooms.Clock
    monkeypatch.setattr(rooms, "Clock", Few)
    limited = {**JOB, "search": {**JOB["search"], "trials": 8, "time_limit_s": 60.0}}
    notes = []
    for _ in range(400):
        Few.looks = 9
        try:
            run = search(limited, out=tmp_path).finish()
        except OutOfTimeError:
            continue
        notes.append(run.note)
        assert (tmp_path / "policy.json").exists()
        if run.price and "time limit" not in run.note:
            break
    assert any("the time limit ended the stage 'price: " in note for note in notes)
    monkeypatch.setattr(rooms, "Clock", clock)
    whole = search({**limited, "search": JOB["search"] | {"trials": 8}}, out=tmp_path / "whole").finish()
    assert run.price == whole.price


def test_a_latency_is_predicted_for_its_own_space_alone(done: Run) -> None:
    assert price.arm_of(replace(done.setting, latency=object())) is None  # type: ignore[arg-type]
    assert price.arm_of(done.setting) == "knapsack"


def test_a_side_that_fails_leaves_a_sentence_and_no_price(done: Run) -> None:
    s = done.setting
    ask = Ask(Policy.dense(s.structure), "refit", split="validation")
    good, bad = Evaluation(ask, 0.1, {"macs": 0.9}), Evaluation.failed(ask, "it exploded", {"macs": 0.9}, 0.0)
    (row,) = price.rows_of(s, "knapsack", [good], [bad])
    assert (row["price"], row["whole"]["loss"], row["within"]["loss"]) == (None, None, 0.1)
    assert row["text"] == f"no price of {HALF} at 0.9: knapsack cannot be scored (it exploded)"


def test_a_database_for_both_holds_all_groups_of_both() -> None:
    whole = analysed("grouped queries")
    held = searched(whole, Space(), "vllm-deci")
    both = joined(held, searched(whole, Space()))
    assert both is not None
    assert set(both.names) == {*held.names, *whole.names}
    assert joined(searched(whole, Space(), "onnx"), searched(whole, Space())) is None
    (first, *rest) = held.groups
    other = Structure((replace(first, name=whole.names[1], width=3, grid=(1, 3)), *rest), held.ops)
    assert joined(other, whole) is None
