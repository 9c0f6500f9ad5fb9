"""The whole way of a small network: the same front whatever the workers, resumable after a kill, an honest summary."""

from __future__ import annotations

import copy
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import autoprune
from autoprune import plugins
from autoprune.allocation.sensitivity import blank_table
from autoprune.comparison.comparison import Comparison
from autoprune.errors import InputError, RunError
from autoprune.evaluation import Ask, Evaluation
from autoprune.files.job import Job
from autoprune.files.policy_file import load_front
from autoprune.front import Front
from autoprune.pareto import hypervolume
from autoprune.policy import Policy
from autoprune.protocols import Batch, Direction, Problem
from autoprune.run.before import seed_asks
from autoprune.run.prepare import prepare
from autoprune.run.run import Run, search
from tests.branches import Net
from tests.conftest import importing_alike
from tests.killable_compare import tiny
from tests.small import RandomTask


def branching() -> RandomTask:
    """A small network with two residual branches."""
    return RandomTask(Net("", "").eval(), (8, 6, 6), 160)


JOB: dict[str, Any] = {
    "task": {"factory": "tests.killable_compare:tiny"},
    "budget": {"macs": [0.2, 0.9], "at": [0.6, 0.3]},
    "search": {"trials": 24, "seed": 3, "window": 4},
    "evaluator": {
        **{"calibration": 64, "validation": 32, "finalists": 2, "finetune_steps": 5},
        **{"fitness": "refit", "sensitivity": 2},
    },
    "executor": {"kind": "inline"},
}


def job(**changes: Any) -> Job:
    """JOB with some sections updated."""
    merged = {k: {**JOB[k], **changes[k]} if k in changes and isinstance(JOB[k], dict) else JOB[k] for k in JOB}
    return Job.from_dict({**changes, **merged})


def figures(front: Front) -> list[tuple[Any, ...]]:
    """What must not depend on where and when a run ran."""
    return [(p.id, p.policy, dict(p.costs), {k: dict(v) for k, v in p.metrics.items()}, p.trial) for p in front]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return search(job(), out=tmp_path_factory.mktemp("finished")).finish()


def test_a_run_leaves_every_file_of_its_folder(finished: Run) -> None:
    names = {p.name for p in finished.path.iterdir()}
    assert {"job.yaml", "study.journal", "database", "policy.json", "front.csv", "report.html", "log.jsonl"} <= names
    assert figures(load_front(finished.path / "policy.json")) == figures(finished.front)
    with (finished.path / "front.csv").open() as file:
        assert [row["id"] for row in csv.DictReader(file)] == [p.id for p in finished.front]
    assert finished.done == pytest.approx(finished.total)


def test_the_front_is_a_front_on_validation_and_its_costs_are_those_of_its_widths(finished: Run) -> None:
    losses = [p.loss() for p in finished.front if not p.finetuned]  # a winner stays, wherever validation puts it
    ratios = [p.ratio("macs") for p in finished.front]
    assert ratios == sorted(ratios)
    assert losses == sorted(losses, reverse=True)
    assert len(losses) > 4
    assert max(ratios) <= 0.9 + 1e-9
    for p in finished.front:
        assert {n: len(k) for n, k in p.keep.items()} == p.policy.as_dict()
        assert abs(p.costs["macs_ratio"] - p.ratio("macs")) < 1e-5


def test_a_run_says_what_each_stage_took(finished: Run) -> None:
    passes = dict.fromkeys(("table", "search"), 0.0)
    full = finished.setting.prices.samples(Ask(Policy.dense(finished.setting.structure), finished.setting.tier))
    total = finished.setting.base.space["calibration"]
    for trial in finished.study.get_trials(deepcopy=False):
        facts = trial.user_attrs
        if facts["stage"] in passes:
            passes[facts["stage"]] += facts["passes"] * total / full
    spent = finished.spent
    assert passes["search"] == pytest.approx(spent["search"])
    assert passes["table"] == pytest.approx(spent["sensitivity table"])


def test_the_summary_puts_the_search_beside_both_control_arms_at_each_asked_budget(finished: Run) -> None:
    assert [(r["budget"], r["arm"]) for r in finished.summary] == [
        (at, arm) for at in (0.6, 0.3) for arm in ("search", "uniform", "global")
    ]
    for row in finished.summary:
        assert row["macs_ratio"] <= row["budget"] + 1e-9
        assert row["tuned_loss"] > 0
        arms = {r["arm"]: r["tuned_loss"] for r in finished.summary if r["budget"] == row["budget"]}
        beaten = arms["search"] < min(arms["uniform"], arms["global"])
        assert row["beat"] == beaten
        assert ("did NOT beat" in row["note"]) == (not beaten)
    events = [json.loads(line) for line in (finished.path / "log.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events[-2:]] == ["summary", "workers"]


def test_worker_processes_give_the_same_front_as_this_process(finished: Run, tmp_path: Path) -> None:
    with_workers = search(job(executor={"kind": "local", "workers": 2}), out=tmp_path / "two")
    assert figures(with_workers.front) == figures(finished.front)


def test_a_second_call_repeats_nothing_and_grown_trials_go_on(finished: Run, tmp_path: Path) -> None:
    short = search(job(search={"trials": 10}), out=tmp_path).finish()
    before = len(short.study.get_trials())
    again = search(job(search={"trials": 10}), out=tmp_path)
    assert figures(again.front) == figures(short.front)
    assert len(again.study.get_trials()) == before
    grown = search(job(), out=tmp_path)
    assert figures(grown.front) == figures(finished.front)


def test_a_changed_job_is_refused_with_the_keys_named_and_fresh_starts_anew(tmp_path: Path) -> None:
    search(job(search={"trials": 4}), out=tmp_path).finish()
    with pytest.raises(InputError, match=r"search\.seed differ"):
        search(job(search={"trials": 4, "seed": 4}), out=tmp_path)
    with pytest.raises(InputError, match=r"search\.trials differ"):
        search(job(search={"trials": 3}), out=tmp_path)
    assert len(search(job(search={"trials": 3, "seed": 4}), out=tmp_path, fresh=True).front) > 0


def test_a_fresh_start_in_a_relative_folder_keeps_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    front = search(job(search={"trials": 2}), out=Path("here")).front
    before = {p.name for p in Path("here/database").glob("*.safetensors")}
    again = search(job(search={"trials": 2}), out=Path("here"), fresh=True).front
    assert figures(again) == figures(front)
    assert {p.name for p in Path("here/database").glob("*.safetensors")} == before


@pytest.mark.parametrize("sampler", plugins.names("samplers"))
def test_every_sampler_by_name_searches_a_model(sampler: str, tmp_path: Path) -> None:
    task = branching() if sampler == "depth_width" else tiny()
    given = job(search={"trials": 6, "sampler": sampler}, evaluator={"finalists": 0, "fitness": "stitch"})
    run = search(given, task=task, out=tmp_path)
    assert len(run.front) > 0
    searched = [t for t in run.study.get_trials() if t.user_attrs["stage"] == "search"]
    full = [t for t in searched if t.user_attrs["passes"] > 0 and t.user_attrs["fraction"] == 1.0]
    partly = sampler in ("evolution", "depth_width")  # they ask on a part of the samples too
    assert 1 <= len(full) <= 6 if partly else len(full) == 6
    assert all("loss" in t.user_attrs for t in searched)


def test_a_point_without_one_of_its_blocks_is_applied_and_read_again(tmp_path: Path) -> None:
    task = branching()
    given = job(search={"trials": 8, "sampler": "depth_width"}, evaluator={"finalists": 0, "validation": 160})
    run = search(given, task=task, out=tmp_path / "run").finish()
    front = load_front(tmp_path / "run" / "policy.json")
    blocks = [g.name for g in front.base.groups if g.kind == "block"]
    assert blocks == ["blocks.0", "blocks.1"]
    point = next(p for p in front if 0 in (p.policy.as_dict()[name] for name in blocks))
    model, inputs = task.build(), task.example_inputs()
    small = autoprune.apply(point, model, inputs, task=task, finetune="none")
    assert task.metrics(small, task.split("validation")) == pytest.approx(dict(point.metrics["validation"]), abs=1e-4)
    assert small.state_dict().keys() < model.state_dict().keys()
    autoprune.save(small, tmp_path / "small")
    again = autoprune.load_applied(tmp_path / "small", task.build(), inputs)
    with torch.no_grad():
        assert torch.equal(again(*inputs), small(*inputs))
    assert run.front


def test_other_weights_or_data_are_not_answered_from_the_record(tmp_path: Path) -> None:
    plain = {**{k: v for k, v in JOB.items() if k != "task"}, "search": {"trials": 2}}
    autoprune.search(plain, task=tiny(), out=tmp_path).finish()
    other = copy.deepcopy(tiny().model)
    other.fc2.bias.data[0] += 5.0
    with pytest.raises(InputError, match="records a search with other weights and data"):
        autoprune.search(plain, task=replace(tiny(), model=other), out=tmp_path).finish()


def test_a_fresh_start_with_a_wrong_job_loses_nothing(tmp_path: Path) -> None:
    search(job(search={"trials": 2}), out=tmp_path).finish()
    before = {p.name: p.stat().st_size for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(InputError, match="out of reach"):
        search(job(budget={"macs": [0.001, 0.9]}), out=tmp_path, fresh=True)
    assert {p.name: p.stat().st_size for p in tmp_path.iterdir() if p.is_file()} == before


def test_the_winner_is_chosen_on_held_back_samples_and_the_gap_is_said(finished: Run) -> None:
    splits = {t.user_attrs["label"].split("@")[0].split(" ")[0]: t.user_attrs["split"] for t in finished.study.trials
              if t.user_attrs["stage"] == "final"}  # fmt: skip
    assert splits["finalist"] == "heldback"
    assert splits["tuned"] == "validation"
    assert all(re.search(r"fitness [\d.e-]+, held back [\d.e-]+, validation", r["note"]) for r in finished.summary)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {"sampler": "optuna.samplers:CmaEsSampler"}}, "multi_objective: false"),
        ({"search": {"sampler": "spdy"}, "evaluator": {"sensitivity": 0}}, "sensitivity table"),
        ({"search": {"sampler": "amc"}, "objectives": {"costs": ["macs", "params"]}}, "amc minimises the loss at one"),
    ],
)
def test_a_sampler_that_cannot_do_the_job_is_refused_before_anything_is_spent(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        search(job(**changes), out=tmp_path / "run")
    assert not (tmp_path / "run" / "job.yaml").exists()  # so that the corrected job may have the folder


def test_a_front_over_two_costs_has_a_hypervolume_over_both(tmp_path: Path) -> None:
    changes = {"objectives": {"costs": ["macs", "params"]}, "search": {"trials": 4}, "evaluator": {"finalists": 0}}
    run = search(job(**changes), out=tmp_path).finish()
    told = run.front.provenance["hypervolume"]
    assert told["reference"] == {"macs": 1.0, "params": 1.0, "log loss": pytest.approx(np.log(10.0))}
    points = [[p.ratio("macs"), p.ratio("params"), np.log(p.loss())] for p in run.front]
    assert told["value"] == pytest.approx(hypervolume(np.array(points), np.array([1.0, 1.0, np.log(10.0)])))
    assert all(row["costs"]["params"] <= 1.0 for row in run.summary)


def test_a_point_that_is_a_control_arms_is_called_that(tmp_path: Path) -> None:
    changes = {"search": {"sampler": "tests.run.test_run:Nothing", "trials": 2}, "evaluator": {"finalists": 0}}
    run = search(job(**changes), out=tmp_path).finish()
    arms = {row["arm"] for row in run.summary} - {"search"}
    kept = [re.search(f"did NOT beat ({'|'.join(arms)}), whose policy it kept", row["note"]) for row in run.summary]
    assert any(kept)
    assert not any("before fine-tuning" in row["note"] for row in run.summary)


class Nothing:
    """Asks for the dense model alone."""

    def __init__(self, problem: Problem, rng: np.random.Generator) -> None:
        self._ask = Ask(Policy.dense(problem.structure), problem.tier)

    def ask(self) -> Ask:
        return self._ask

    def tell(self, evaluation: Evaluation) -> None:
        pass


def test_a_dense_model_that_misses_a_constraint_is_said_before_the_budget_is_spent(tmp_path: Path) -> None:
    run, said = search(job(constraints={"accuracy": ">=1.5"}, search={"trials": 4}), out=tmp_path), list[str]()
    with pytest.raises(RunError, match="no point of the front keeps the constraints"):
        said.extend(run.note for _ in run if run.stage == "search")
    assert "the dense model itself misses accuracy >= 1.5, of which it has" in said[0]


def test_a_small_ledger_keeps_the_seeds_at_the_asked_budgets(tmp_path: Path) -> None:
    setting = prepare(job(search={"trials": 9}), tmp_path)
    setting = replace(setting, problem=replace(setting.problem, table=blank_table(setting.structure)))
    labels = [label for label, _ in seed_asks(setting.problem, setting.controls, ledger=9)]
    assert len(labels) == 3
    assert {"knapsack@0.6", "knapsack@0.3"} < set(labels)


def test_a_budget_out_of_reach_names_the_reachable_range(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"budget macs=0\.001 is out of reach: macs can be between"):
        search(job(budget={"macs": [0.001, 0.9]}), out=tmp_path)


def test_a_model_from_python_is_searched_without_a_job_file(tmp_path: Path) -> None:
    plain = {k: v for k, v in JOB.items() if k not in ("task", "executor")}
    plain["search"] = {"trials": 4, "sampler": "random"}
    run = autoprune.search(plain, task=tiny(), out=tmp_path)
    assert [e.ask.split for e in run].count("fitness") >= 4
    assert len(run.front) > 0


def _start(folder: Path, job_file: Path) -> subprocess.Popen[bytes]:
    code = "import sys; from autoprune.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "search", str(job_file), "--out", str(folder), "--workers", "1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=importing_alike(), start_new_session=True, **quiet)


def _lines(folder: Path) -> int:
    journal = folder / "study.journal"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(job(executor={"kind": "local"}).dump())
    return path


def test_killed_at_a_random_moment_it_resumes_to_the_front_of_the_uninterrupted_run(
    finished: Run, job_file: Path, tmp_path: Path
) -> None:
    folder, rng = tmp_path / "killed", np.random.default_rng(0)
    process, wanted = _start(folder, job_file), int(rng.integers(3, 40))
    while process.poll() is None and _lines(folder) < wanted:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was still at work"
    held = (folder / "study.journal").read_bytes()
    (folder / "study.journal").write_bytes(held + b'{"op_code": 4, "torn')  # a line that the kill cut short
    resumed = search(job(), out=folder).finish()
    assert figures(load_front(folder / "policy.json")) == figures(resumed.front) == figures(finished.front)
    seen = [(t.user_attrs["stage"], t.user_attrs["ask"]) for t in resumed.study.get_trials()]
    assert len(seen) == len(set(seen)) == len(finished.study.get_trials())


def test_the_cascade_calibrates_itself_and_says_what_it_chose(tmp_path: Path) -> None:
    run = search(job(search={"trials": 4}, evaluator={"fitness": "auto"}), out=tmp_path).finish()
    facts = json.loads((tmp_path / "proxy.json").read_text())
    assert [q["tier"] for q in facts["qualities"]] == ["stitch", "refit", "tune"]
    assert facts["tier"] in ("stitch", "refit")
    assert facts["verdict"] == run.note
    attributes = [t.user_attrs for t in run.study.get_trials()]
    assert {a["tier"] for a in attributes if a["stage"] == "proxy"} == {"stitch", "refit", "tune"}
    assert {a["tier"] for a in attributes if a["stage"] == "search"} == {facts["tier"]}
    before = len(attributes)
    assert figures(search(job(search={"trials": 4}, evaluator={"fitness": "auto"}), out=tmp_path).front) == figures(
        run.front
    )
    assert len(run.study.get_trials()) == before


def test_a_warm_start_seeds_the_search_and_another_structure_is_refused(finished: Run, tmp_path: Path) -> None:
    front = str(finished.path / "policy.json")
    warm = search(job(search={"trials": 2, "warm_start": front}), out=tmp_path / "warm").finish()
    labels = {t.user_attrs["label"] for t in warm.study.get_trials() if t.user_attrs["stage"] == "seed"}
    assert {f"warm {p.id}" for p in finished.front} <= labels
    narrower = {"warm_start": front, "trials": 2}
    with pytest.raises(InputError, match=r"search\.warm_start: .* belongs to another structure or space"):
        search(job(search=narrower, space={"exclude": ["fc1"]}), out=tmp_path / "other")
    with pytest.raises(InputError, match="cannot read the policy file"):
        search(job(search={"warm_start": "nowhere.json"}), out=tmp_path / "none")


def test_patience_stops_on_a_plateau(tmp_path: Path) -> None:
    run = search(job(search={"trials": 300, "patience": 3}), out=tmp_path).finish()
    assert "search.patience" in run.note
    assert sum(t.user_attrs["stage"] == "search" for t in run.study.get_trials()) < 300


@dataclass(frozen=True)
class TwoMetrics(RandomTask):
    """What is right, and what is wrong."""

    @property
    def directions(self) -> Mapping[str, Direction]:
        return {"accuracy": "maximize", "error": "minimize"}

    def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        accuracy = super().metrics(model, batches)["accuracy"]
        return {"accuracy": accuracy, "error": 1.0 - accuracy}


def two_metrics() -> TwoMetrics:
    return TwoMetrics(tiny().model, tiny().shape)


def test_constraints_hold_on_the_exported_front_and_an_impossible_one_keeps_the_work(tmp_path: Path) -> None:
    bound = {"constraints": {"accuracy": ">=0.7", "error": "<=0.25"}, "task": {"factory": f"{__name__}:two_metrics"}}
    run = search(job(search={"trials": 8}, **bound), out=tmp_path / "floor").finish()
    for point in run.front:
        figures_ = point.metrics.get("finetuned", point.metrics["validation"])
        assert figures_["accuracy"] >= 0.75
        assert figures_["error"] <= 0.25
    fitness = [t.user_attrs for t in run.study.get_trials() if t.user_attrs["stage"] == "search"]
    assert all("accuracy" in a["metrics"] for a in fitness if a["fraction"] == 1.0)
    with pytest.raises(RunError, match=r"no point of the front keeps the constraints .*accuracy >= 1\.5"):
        search(job(search={"trials": 2}, constraints={"accuracy": ">=1.5"}), out=tmp_path / "none").finish()
    with pytest.raises(InputError, match=r"constraints: the task has no metric 'acuracy'"):
        search(job(constraints={"acuracy": ">=0.5"}), out=tmp_path / "typo")


def test_a_refused_call_leaves_no_new_folder_and_one_that_was_there_alone(tmp_path: Path) -> None:
    (tmp_path / "mine" / "notes").mkdir(parents=True)
    wrong = job(constraints={"acuracy": ">=0.5"})
    for out in (tmp_path / "runs" / "new", tmp_path / "mine", tmp_path / "mine" / "notes" / "new"):
        with pytest.raises(InputError, match="acuracy"):
            search(wrong, out=out)
    with pytest.raises(InputError, match="acuracy"):
        Comparison(wrong, ["uniform"], out=tmp_path / "runs" / "compared").finish()
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["mine", "mine/notes"]


def test_a_call_that_is_refused_late_leaves_the_level_database_to_the_corrected_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="popsize"):
        search(job(search={"options": {"popsize": 3}}), out=tmp_path / "new")
    (file,) = (tmp_path / "new" / "database").glob("*.safetensors")
    held = [p.relative_to(tmp_path / "new") for p in (tmp_path / "new").rglob("*") if p.is_file()]
    assert {p.parts[0] for p in held} == {"database"}
    written = file.stat().st_mtime_ns
    search(job(), out=tmp_path / "new")
    assert file.stat().st_mtime_ns == written


def test_front_points_carry_bootstrap_intervals(finished: Run) -> None:
    for point in finished.front:
        loss = point.losses["validation"]
        assert loss["name"] == "kl"
        assert loss["low"] <= loss["loss"] <= loss["high"]
    assert any(p.losses["validation"]["low"] < p.losses["validation"]["high"] for p in finished.front)


def test_a_front_over_several_costs_measures_latency_again(tmp_path: Path) -> None:
    several = {
        "objectives": {"loss": "kl", "costs": ["macs", "latency", "params"]},
        "latency": {"runtime": "eager", "models": 20},
    }
    run = search(job(search={"trials": 4}, **several), out=tmp_path).finish()
    assert "latency on eager" in (run.path / "log.jsonl").read_text() or run.note
    for point in run.front:
        assert point.costs["latency"]["ratio"] > 0
        assert point.costs["latency"]["iqr"] >= 0
    most = max(point.ratio("latency") for point in run.front)
    assert run.front.select(latency=most).ratio("latency") <= most
    assert run.front.measured_on["runtime"] == "eager"
