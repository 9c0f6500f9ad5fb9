"""Comparing strategies: one row each, verdicts by a fixed rule, wrong input answered early, resumed after a kill."""

from __future__ import annotations

import csv
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna import load_study
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from autoprune.cli import run
from autoprune.comparison.arm import Arm, Scored
from autoprune.comparison.checks import parse_seeds
from autoprune.comparison.comparison import Comparison, closed_form_asks, compare
from autoprune.comparison.document import COLUMNS
from autoprune.comparison.verdict import Case, judge, verdict
from autoprune.errors import InputError
from autoprune.files.job import Job
from autoprune.policy import Policy
from autoprune.protocols import Problem
from autoprune.record.lock import locked
from autoprune.record.storage import STUDY_NAME
from autoprune.strategies import uses_table
from autoprune.strategies.uniform import uniform
from tests import killable_compare
from tests.conftest import importing_alike
from tests.killable_compare import BUDGETS, SEEDS, STRATEGIES, tiny_job

NARROW = "tests.comparison.test_comparison:narrow"
ROOT = Path(__file__).parents[2]


def narrow(problem: Problem, target: float) -> Policy:
    """A user's own strategy."""
    return uniform(problem, target * 0.8)


def broken(problem: Problem, target: float) -> Policy:
    raise ValueError("no policy today")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return Comparison(tiny_job(), STRATEGIES, BUDGETS, SEEDS, tmp_path_factory.mktemp("whole")).finish()


def figures(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows without the time, which no two runs share."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in document["rows"]]


def test_every_strategy_budget_and_seed_has_a_row_in_csv_and_json(finished: Comparison) -> None:
    with (finished.path / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    keys = [(r["strategy"], float(r["budget"]), int(r["seed"])) for r in rows]
    assert keys == [(name, budget, seed) for name in STRATEGIES for budget in BUDGETS for seed in SEEDS]
    for row in rows:
        assert float(row["macs_ratio"]) <= float(row["budget"]) + 1e-9
        assert float(row["hypervolume"]) > 0
        assert float(row["evaluations"]) > 0
    document = json.loads((finished.path / "compare.json").read_text())
    assert document == json.loads(json.dumps(finished.document))
    assert document["reference"]["macs_ratio"] == 1.0
    assert (finished.path / "compare.html").stat().st_size > 100_000


def test_closed_forms_are_the_same_for_every_seed_and_searches_are_not(finished: Comparison) -> None:
    for name in STRATEGIES:
        losses = {row["loss"] for row in finished.document["rows"] if (row["strategy"], row["budget"]) == (name, 0.4)}
        assert len(losses) == (1 if name != "random" else len(SEEDS)), name


def test_every_search_spends_the_same_ledger(finished: Comparison) -> None:
    spent = {c["ledger"] for c in finished.document["cells"] if c["strategy"] == "random"}
    assert spent == {8.0}


def test_a_closed_forms_work_is_that_of_the_evaluations_that_ran(finished: Comparison) -> None:
    for name in ("uniform", "global"):
        arm = finished.arms[name, SEEDS[0]]
        setting = finished._setting
        asks = [ask for _, ask in closed_form_asks(setting.problem, name)]
        assert arm.evaluations == len(set(asks)) < len(asks)
        forward = sum(setting.prices.samples(ask) for ask in set(asks))
        assert arm.passes == pytest.approx(forward / setting.base.space["calibration"])


def test_every_point_of_a_front_carries_its_interval(finished: Comparison) -> None:
    for cell in finished.document["cells"]:
        assert cell["front"]
        for point in cell["front"]:
            assert point["low"] <= point["loss"] <= point["high"]


def test_a_second_call_measures_nothing_and_says_the_same(finished: Comparison) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.path.rglob("*.json") if p.name != "compare.json"}
    again = Comparison(tiny_job(), STRATEGIES, BUDGETS, SEEDS, finished.path)
    assert sum(1 for _ in again) == 0
    assert again.kept == again.n_arms == 4
    assert again.document == finished.document
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_strategy_that_is_added_later_leaves_finished_cells_alone(finished: Comparison) -> None:
    more = Comparison(tiny_job(), (*STRATEGIES, NARROW), BUDGETS, SEEDS, finished.path).finish()
    assert (more.kept, more.n_arms) == (4, 5)
    own = {k: v for k, v in more.arms.items() if k[0] in STRATEGIES}
    assert own == finished.arms
    assert all(v["control"] == "global" for v in more.document["verdicts"])
    assert {v["strategy"] for v in more.document["verdicts"]} == {"random", NARROW}


def test_a_changed_job_is_refused_with_the_keys_named(finished: Comparison) -> None:
    with pytest.raises(InputError, match=r"another job: evaluator\.validation differ"):
        compare(tiny_job(evaluator={"validation": 16}), STRATEGIES, BUDGETS, SEEDS, finished.path)


def test_grown_trials_go_on_from_the_searches_that_are_there(tmp_path: Path) -> None:
    short = Comparison(tiny_job(search={"trials": 4}), ("random",), (0.5,), (0,), tmp_path).finish()
    (journal,) = tmp_path.glob("random*/study.journal")
    before = searched(journal)
    grown = Comparison(tiny_job(), ("random",), (0.5,), (0,), tmp_path).finish()
    assert grown.kept == 0
    assert [c.document["cells"][0]["ledger"] for c in (short, grown)] == [4, 8]
    after = searched(journal)
    assert after[: len(before)] == before
    assert len(after) == len(set(after)) > len(before), "the first six were not asked again"


def test_a_search_that_starts_from_seeds_goes_on_when_its_trials_grow(tmp_path: Path) -> None:
    job = tiny_job(search={"trials": 6, "sampler": "evolution"})
    Comparison(job, ("evolution",), (0.5,), (0,), tmp_path).finish()
    grown = Comparison(tiny_job(search={"trials": 9, "sampler": "evolution"}), ("evolution",), (0.5,), (0,), tmp_path)
    assert grown.document["cells"][0]["ledger"] == pytest.approx(9, abs=1)


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("lamp", False),
        ("owl", False),
        ("knapsack", True),
        ("fastnas", True),
        (NARROW, False),
    ],
)
def test_only_strategies_that_declare_it_make_the_table_be_measured(name: str, reads: bool) -> None:
    assert uses_table(name) is reads


def test_a_range_that_reaches_up_to_the_dense_model_is_compared(tmp_path: Path) -> None:
    rows = compare(tiny_job(), ("uniform", "random"), (1.0,), (0,), tmp_path)["rows"]
    assert [row["strategy"] for row in rows] == ["uniform", "random"]


def test_an_arm_that_misses_a_constraint_has_no_point_and_the_others_stand(tmp_path: Path) -> None:
    job = tiny_job(constraints={"accuracy": ">=1.5"})
    document = Comparison(job, ("uniform", "random"), (0.5,), (0,), tmp_path).document
    assert [(row["loss"], row["hypervolume"]) for row in document["rows"]] == [(None, 0.0)] * 2
    assert (tmp_path / "compare.csv").exists()


def searched(journal: Path) -> list[int]:
    """The asks of the search in the order in which they were recorded."""
    trials = load_study(study_name=STUDY_NAME, storage=JournalStorage(JournalFileBackend(str(journal)))).trials
    return [t.user_attrs["ask"] for t in trials if t.user_attrs["stage"] == "search"]


def test_options_of_the_job_go_to_its_own_sampler_alone(tmp_path: Path) -> None:
    job = tiny_job(search={"sampler": "tpe", "trials": 3, "options": {"n_startup_trials": 2}})
    assert len(compare(job, ("tpe", "random"), (0.5,), (0,), tmp_path)["rows"]) == 2


def start(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(killable_compare.__file__), str(folder), str(log)]
    return subprocess.Popen(command, env=importing_alike(), stderr=subprocess.PIPE)


def test_killed_at_a_random_moment_it_goes_on_and_measures_no_finished_cell_again(
    finished: Comparison, tmp_path: Path
) -> None:
    folder, first, second = tmp_path / "killed", tmp_path / "first", tmp_path / "second"
    process, wanted = start(folder, first), random.Random(0).randint(1, 8)
    while process.poll() is None and (not first.exists() or first.read_text().count("arm 4 of 4") < wanted):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "it was still at work"
    assert not (folder / "compare.csv").exists()
    arms = {p: p.stat().st_mtime_ns for p in [*folder.glob("*/arm.json"), *folder.glob("closed-form*/*.json")]}
    assert len(arms) == 3, "the last one was under way"
    killable_compare.main(folder, second)
    assert {p: p.stat().st_mtime_ns for p in arms} == arms
    assert set(second.read_text().splitlines()) == {"arm 4 of 4: random, seed 1"}
    assert figures(json.loads((folder / "compare.json").read_text())) == figures(finished.document)
    assert not list(folder.rglob("*.part"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": ("unifrom",)}, "unknown name 'unifrom'; did you mean 'uniform'"),
        ({"strategies": ()}, "at least one strategy"),
        ({"strategies": ("tests.comparison.test_comparison:nothing",)}, "has no 'nothing'"),
        (
            {"strategies": ("tests.comparison.test_comparison:broken",)},
            "broken fails at the .*: no policy today",
        ),
        ({"strategies": ("optuna.samplers:CmaEsSampler",)}, "optuna.samplers:CmaEsSampler: .*objective"),
        ({"budgets": ()}, "at least one budget"),
        ({"budgets": (1.5,)}, r"1\.5 is no ratio"),
        ({"budgets": (float("nan"),)}, "nan is no ratio"),
        ({"budgets": (0.5, 0.001)}, r"budget macs=0\.001 is out of reach: macs can be between"),
        ({"seeds": 0}, "at least one seed"),
        ({"seeds": ()}, "at least one seed"),
        ({"seeds": (-1,)}, "none negative"),
    ],
)
def test_wrong_input_is_answered_before_anything_is_searched(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    asked = {"strategies": ("uniform", "random"), "budgets": (0.5,), "seeds": 1, **changes}
    with pytest.raises(InputError, match=message):
        Comparison(tiny_job(), **asked, out=tmp_path).finish()
    assert not list(tmp_path.rglob("study.journal"))


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", 3), ("0,1,2", (0, 1, 2)), ("7,", (7,)), (" 4 , 5 ", (4, 5)), (",", ())]
)
def test_seeds_are_a_number_or_a_list(text: str, seeds: object) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "0", ",", "many", "1.5", "-1,2"])
def test_the_command_line_refuses_seeds_that_are_none_in_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text(tiny_job().dump())
    out = tmp_path / "out"
    assert run(["compare", str(tmp_path / "job.yaml"), "--seeds", text, "--out", str(out)]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "--seeds" in errors
    assert not out.exists()


def test_the_command_line_prints_the_table_and_the_verdicts_last(
    finished: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text(tiny_job().dump())
    arguments = ["compare", str(tmp_path / "job.yaml"), "--strategies", ",".join(STRATEGIES), "--budgets", "0.6,0.4"]
    arguments += ["--seeds", "0,1", "--out", str(finished.path)]
    assert run(arguments) == 0
    shown = capsys.readouterr()
    assert "4 of 4 arms were finished before" in shown.err
    assert "±" in shown.out
    assert all(name in shown.out for name in STRATEGIES)
    *_, last = shown.out.strip().splitlines()
    assert last.startswith("layer-wise ")
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == finished.document["rows"]


def points(means: list[float], n: int = 400, seed: int = 0) -> list[Scored]:
    """A point a seed, whose sample losses share what is hard about the samples."""
    rng = np.random.default_rng(seed)
    hard = np.random.default_rng(99).exponential(1.0, n)
    rows = [mean + hard + rng.normal(0, 0.05, n) for mean in means]
    return [Scored("p", 0.5, 0.5, float(np.mean(r)), 0.9, None, None, tuple(r)) for r in rows]


CASE = Case(0.5, "evolution", "global")


def test_a_clear_gain_beats_the_control_and_says_so() -> None:
    said = verdict(CASE, points([0.10, 0.11, 0.09]), points([0.2, 0.2, 0.2], seed=1))
    assert said.outcome == "beat"
    assert said.text.startswith("layer-wise beat global at 0.5: evolution has the lower loss, ")
    assert said.high is not None
    assert said.high < 0
    assert "3 seeds x 400 samples" in said.text


def test_a_clear_loss_is_published_as_such() -> None:
    said = verdict(CASE, points([0.3, 0.31, 0.29]), points([0.2, 0.2, 0.2], seed=1))
    assert said.outcome == "worse"
    assert said.text.startswith("layer-wise did NOT beat global at 0.5: evolution is worse, ")


def test_seeds_that_disagree_show_no_difference() -> None:
    said = verdict(CASE, points([0.05, 0.25, 0.19]), points([0.2, 0.2, 0.2], seed=1))
    assert said.outcome == "no difference shown"
    assert said.text.startswith("layer-wise did NOT beat global at 0.5: evolution shows no difference, ")


def test_a_budget_that_a_seed_did_not_reach_is_not_won() -> None:
    said = verdict(CASE, [*points([0.1, 0.1]), None], points([0.2, 0.2, 0.2], seed=1))
    assert said.outcome == "no point"
    assert "did NOT beat global at 0.5: evolution has no point within the budget" in said.text


def test_without_sample_losses_the_seeds_alone_decide() -> None:
    bare = [replace(p, sample_losses=()) for p in points([0.1, 0.11, 0.09])]
    said = verdict(CASE, bare, [replace(p, sample_losses=()) for p in points([0.2, 0.2, 0.2])])
    assert said.outcome == "beat"
    assert said.text.endswith("(3 seeds alone)")


def test_one_seed_is_too_few_to_tell_but_for_two_that_are_the_same_at_every_seed() -> None:
    said = verdict(CASE, points([0.1]), points([0.2], seed=1))
    assert (said.outcome, said.low) == ("too few seeds", None)
    assert "did NOT beat global at 0.5: too few seeds to tell, 1 where it takes 2 or more" in said.text
    same = replace(CASE, unchanging=True)
    assert verdict(same, points([0.1]), points([0.2], seed=1)).outcome == "beat"
    alike = verdict(same, points([0.1]) * 3, points([0.2], seed=1) * 3)
    assert (alike.outcome, alike.seeds, alike.samples) == ("beat", 1, 400)


def test_uniform_is_the_control_where_global_is_not_compared(finished: Comparison) -> None:
    only = {key: arm for key, arm in finished.arms.items() if key[0] != "global"}
    assert {v.control for v in judge(only, BUDGETS, ("uniform",), ())} == {"uniform"}
    assert {v.strategy for v in judge(finished.arms, BUDGETS, ("uniform", "global"), ())} == {"random"}
    assert judge(only, BUDGETS, (), ()) == ()


def test_the_control_arms_of_the_job_stand_in_the_table_and_the_last_is_the_one_to_beat(tmp_path: Path) -> None:
    job = tiny_job(compare={"controls": ["uniform", NARROW]})
    found = Comparison(job, ("random",), (0.6,), (0, 1), tmp_path).finish()
    assert found.strategies == ("uniform", NARROW, "random")
    assert [(v["strategy"], v["control"]) for v in found.document["verdicts"]] == [("random", NARROW)]
    assert Comparison(tiny_job(), None, (0.6,), (0,), tmp_path / "other").strategies == (
        "uniform",
        "global",
        "evolution",
    )


def test_a_row_speaks_of_the_budgets_cost_and_the_tasks_first_metric(tmp_path: Path) -> None:
    params = {"budget": {"params": [0.3, 0.9], "at": [0.6]}, "objectives": {"costs": ["params"]}}
    plain = {**tiny_job().plain(), **params}
    document = compare(Job.from_dict(plain), ("uniform", "random"), (0.6,), (0,), tmp_path)
    with (tmp_path / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0])[-4:] == ("cost", "cost_ratio", "metric", "value")
    for row in rows:
        assert row["cost"] == "params"
        assert float(row["cost_ratio"]) <= 0.6 + 1e-9
        assert float(row["cost_ratio"]) != float(row["macs_ratio"])
        assert row["metric"] == next(iter(document["dense"]))
        assert row["accuracy"] == (row["value"] if row["metric"] == "accuracy" else "")
    assert document["reference"]["params_ratio"] == 1.0


def test_a_folder_in_use_is_told_before_anything_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprune.comparison.comparison.preparing", lambda *_: pytest.fail("it prepared first"))
    with locked(tmp_path), pytest.raises(InputError, match="is in use by process"):
        Comparison(tiny_job(), STRATEGIES, BUDGETS, SEEDS, tmp_path).finish()


def test_the_document_is_made_once(finished: Comparison) -> None:
    assert finished.document is finished.document
    assert json.loads((finished.path / "compare.json").read_text())["verdicts"] == finished.document["verdicts"]


def test_the_arm_of_a_search_is_found_where_older_versions_kept_it(finished: Comparison, tmp_path: Path) -> None:
    folder = shutil.copytree(finished.path, tmp_path / "old")
    for file in folder.glob("*/arm.json"):
        file.rename(file.with_name("cell.json"))
    again = Comparison(tiny_job(), STRATEGIES, BUDGETS, SEEDS, folder).finish()
    assert again.kept == again.n_arms
    assert figures(again.document) == figures(finished.document)


def test_an_arm_comes_back_from_its_file_and_one_of_another_key_does_not(finished: Comparison, tmp_path: Path) -> None:
    arm, path = finished.arms["random", 1], tmp_path / "arm.json"
    arm.save(path)
    assert Arm.load(path, arm.key) == arm
    assert Arm.load(path, "sha256:other") is None
    path.write_text(path.read_text()[:-40])
    assert Arm.load(path, arm.key) is None
    assert Arm.load(tmp_path / "none.json", arm.key) is None


def test_ctrl_c_while_it_is_prepared_says_that_the_same_command_starts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "job.yaml").write_text(tiny_job().dump())
    for verb, module in (("search", "run.opening"), ("compare", "comparison.comparison")):
        monkeypatch.setattr(f"autoprune.{module}.preparing", interrupted)
        assert run([verb, str(tmp_path / "job.yaml"), "--out", str(tmp_path / verb)]) == 130
        assert "before its first evaluation; the same command starts it" in capsys.readouterr().err
        assert not (tmp_path / verb).exists()


def test_workers_and_a_time_limit_may_change_when_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(tiny_job().dump())
    arguments = ["compare", str(tmp_path / "job.yaml"), "--strategies", "uniform", "--budgets", "0.6", "--seeds", "0,"]
    out = ["--out", str(tmp_path / "out")]
    assert run([*arguments, *out]) == 0
    assert run([*arguments, *out, "--workers", "1", "--time-limit", "60s"]) == 0
