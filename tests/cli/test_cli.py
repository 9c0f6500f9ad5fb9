"""The command line as a user meets it: exit codes, one-line errors, JSON on stdout, resume."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import autoprune
from autoprune import plugins
from autoprune.cli import run
from autoprune.estimates import LEVEL
from autoprune.files.job_parts import SearchPart
from autoprune.files.policy_file import load_front
from autoprune.report.read import read_trials
from tests.conftest import ROOT, SHORT, autoprune_process, importing_alike
from tests.fronts import synthetic_front, write_run
from tests.killable_compare import tiny_job

DIGITS = str(ROOT / "search_spaces" / "digits.yaml")
TINY = "tiny.yaml"
APPLY = ("apply", "none.json", "--task", DIGITS, "--out", "x")


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """The job TINY, of a network so small that its evaluations take milliseconds."""
    (tmp_path / TINY).write_text(tiny_job(evaluator={"finalists": 1, "finetune_steps": 2}).dump())
    return str(tmp_path / TINY)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def fails(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that must end with `code`; on a busy machine stages may be told before."""
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert all(line.endswith(": under way") for line in captured.out.splitlines())
    assert captured.err.startswith("autoprune: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_version_and_short_help_answer_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"autoprune {autoprune.__version__}\n"
    for arguments in (["-h"], ["search", "-h"]):
        assert run(arguments) == 0
        assert capsys.readouterr().out.startswith("Usage: autoprune")


def test_help_is_instant_and_loads_no_torch() -> None:
    program = (
        "import sys, autoprune.cli as c; c.run(['--help']); sys.exit(bool({'torch', 'numpy', 'ray'} & {*sys.modules}))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0  # whatever else runs here
    assert all(word in done.stdout for word in ("inspect", "search", "compare", "apply", "front", "report", "doctor"))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("inspect", ["runs/<job's name> by default", "--set search.trials=100"]),
        ("search", ["runs/<job's name> by default", "--set search.trials=100", f"or {SearchPart().trials}."]),
        ("compare", ["runs/<job's name>-compare", "equal ledger", f"{100 * LEVEL:g} % interval"]),
        ("compare", [*plugins.names("strategies"), *plugins.names("samplers")]),
    ],
)
def test_the_help_of_a_command_teaches_defaults_names_and_rules(
    command: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert [word for word in words if word not in text] == []


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "Usage: autoprune" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serch"], "Did you mean 'search'"),
        (["search"], "JOB.yaml"),
        (["search", "nowhere.yaml"], "cannot read the job file nowhere.yaml"),
        (["search", DIGITS, "--trails", "3"], "--trails"),
        (["search", DIGITS, "--trials", "0"], "search.trials: .* not 0"),
        (["search", DIGITS, "--set", "search.samplr=tpe"], "did you mean 'sampler'"),
        (["search", DIGITS, "--set", "search.sampler=tp"], "did you mean 'tpe'"),
        (["search", DIGITS, "--set", "criterion=taylr"], "did you mean 'taylor'"),
        (["search", DIGITS, "--set", "task.name=digit"], "did you mean 'digits'"),
        (["inspect", TINY, "--set", "space.include=[foo*]"], "'foo.' matches no group"),
        (["inspect", DIGITS, "--set", "constraints.accuracy=0.97"], "constraints.accuracy: .*'>=0.97'.* not 0.97"),
        (["inspect", DIGITS, "--set", "constraints.accuracy=>=0.97"], "--set \"constraints.accuracy='>=0.97'\""),
        (
            ["search", TINY, "--set", "search.sampler=evolution", "--set", "search.options.fractions=0.5"],
            r"search.options: the sampler evolution refuses \{'fractions': 0.5\}: .*not iterable",
        ),
        (
            ["search", TINY, "--set", "search.sampler=tpe", "--set", "search.options.n_startup_trials=x"],
            "search.options: the sampler cannot ask: ",
        ),
        (
            ["compare", TINY, "--set", "search.sampler=evolution", "--set", "search.options.fractions=0.5"],
            "--strategies: search.options: the sampler evolution refuses",
        ),
        (["compare", DIGITS, "--budgets", "half"], "--budgets takes ratios"),
        (["compare", DIGITS, "--strategies", "unifrm"], "did you mean 'uniform'"),
        (["compare", DIGITS, "--seeds", "0"], "--seeds"),
        (["report", "nowhere"], "holds no policy.json"),
        (
            ["apply", "none.json", "--task", DIGITS, "--at", "knee", "--out", "x"],
            "cannot read the policy file none.json",
        ),
        (["apply", "n.json", "--task", DIGITS, "--at", "knee", "--out", "x", "--export", "pt3"], "did you mean 'pt2'"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(message, fails(arguments, 2, capsys))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("users_a", "import torch\ndef make(): return torch.nn.Linear(2, 2)", "returned a Linear without build"),
        ("users_b", "def make(): raise OSError('no disk')", "failed: OSError: no disk"),
        ("users_c", "import nothing_like_this", "cannot import 'users_c'"),
        ("users_d", "def make(: pass", "cannot import 'users_d' of 'users_d:make': SyntaxError"),
    ],
)
def test_a_users_broken_task_is_one_line(
    name: str, body: str, message: str, capsys: pytest.CaptureFixture[str], in_tmp: Path
) -> None:
    (in_tmp / f"{name}.py").write_text(body)
    (in_tmp / "job.yaml").write_text(f"task: {{factory: '{name}:make'}}")
    assert message in fails(["inspect", "job.yaml"], 2, capsys)


def test_a_file_that_cannot_be_written_is_one_line_and_exit_3(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AUTOPRUNE_DEBUG", raising=False)
    (tmp_path / "policy.json").mkdir()  # a folder where a file should be
    assert "cannot read the policy file" in fails(["report", str(tmp_path)], 2, capsys)
    write_run(tmp_path / "run", synthetic_front())
    (tmp_path / "run" / "report.html").mkdir()
    assert "Is a directory" in fails(["report", str(tmp_path / "run")], 3, capsys)


def test_inspect_prints_every_group_its_share_and_what_is_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", DIGITS]) == 0
    text = capsys.readouterr().out
    assert "layer2.0.conv1" in text
    assert "frozen: linear: " in text
    assert "MACs a sample" in text


def test_inspect_gives_json_that_agrees_with_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", DIGITS, "--json", "--set", "space.multiple_of=4"]) == 0
    facts = json.loads(capsys.readouterr().out)
    groups = {group["name"]: group for group in facts["groups"]}
    assert groups["layer3.0.conv1"]["grid"] == [4, 8, 12, 16, 20, 24, 28, 32]
    assert facts["dense"] == {"macs": 414528, "params": 44226}
    assert all(0 < group["macs_share"] < 1 for group in facts["groups"])
    assert set(facts["frozen"]) == {"linear"}


def test_search_leaves_its_files_and_a_table_of_the_asked_budgets(finished_run: Path) -> None:
    folder = finished_run / "runs" / "digits"
    names = {"job.yaml", "study.journal", "policy.json", "front.csv", "report.html", "log.jsonl", "database"}
    assert names <= {path.name for path in folder.iterdir()}
    table = (finished_run / "stdout.txt").read_text()
    for word in ("0.7", "0.5", "0.3", "search", "uniform", "global", "points on the front"):
        assert word in table
    front = load_front(folder / "policy.json")
    with (folder / "front.csv").open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == [point.id for point in front]


def test_inspect_shows_the_densities_of_weights_and_what_stays_dense(capsys: pytest.CaptureFixture[str]) -> None:
    zeros = (
        "budget={nonzeros: [0.3, 0.9]}",
        "objectives={loss: kl, costs: [nonzeros]}",
        "space.exclude=[linear.weight]",
    )
    arguments = [part for said in zeros for part in ("--set", said)]
    assert run(["inspect", DIGITS, *arguments, "--set", "space.granularity=weight"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"layer2\.0\.conv1\.weight +│ weight +│ +\d+x\d+x3x3 +│ +\d[\d.]*\.\.100 % \(\d+\)", out)
    assert "frozen: linear.weight: excluded by 'linear.weight' (space.exclude)" in out
    assert "frozen: conv1.weight: each of its outputs reads one channel: it stays dense" in out
    assert "frozen: conv1: its kind is channel, the job searches weight (space.granularity)" in out
    assert "frozen: linear: its channels are the model's output" in out, "its weight is not searched"
    assert run(["inspect", DIGITS, *arguments, "--set", "space.granularity='2:4'", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert all(g["pattern"] == "2:4" and len(g["grid"]) == 2 and g["macs_share"] > 0 for g in facts["groups"])
    assert set(facts["frozen"]) == {"linear", "linear.weight", "conv1", "conv1.weight"}
    both = [*arguments[:4], "--set", "space.granularity=[channel, weight]", "--json"]
    assert run(["inspect", DIGITS, *both]) == 0
    assert set(json.loads(capsys.readouterr().out)["frozen"]) == {"linear", "conv1.weight"}, "linear has a reason"


def test_inspect_measures_the_sensitivity_table_and_says_what_it_predicts(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoprune.tracing import analyze

    looked, look = list[object](), analyze.observe
    monkeypatch.setattr(analyze, "observe", lambda *given: looked.append(given) or look(*given))
    out = tmp_path / "sensitivity"
    wanted = ["inspect", tiny, "--sensitivity", "--json", "--out", str(out)]
    assert run(wanted) == 0
    assert len(looked) == 1, "the model was analysed more than once"
    whole = json.loads(capsys.readouterr().out)
    facts = whole.pop("sensitivity")
    assert run(["inspect", tiny, "--json"]) == 0
    assert {**json.loads(capsys.readouterr().out), "said": whole["said"]} == whole
    ratios, losses = ([row[key] for row in facts["predicted"]] for key in ("ratio", "loss"))
    assert ratios == sorted(ratios)
    assert losses == sorted(losses, reverse=True)
    assert (ratios[-1], losses[-1], facts["cost"]) == (1.0, 0.0, "macs")
    assert Path(facts["plot"]).stat().st_size > 100_000
    assert run([w for w in wanted if w != "--json"]) == 0
    assert re.search(r"a knapsack is predicted a loss of [\d.e-]+ at 0\.\d+", capsys.readouterr().out)


def test_a_second_search_refuses_a_changed_job_and_names_the_keys(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(own_run / "runs" / "digits")]
    line = fails(["search", DIGITS, *out, *SHORT, "--seed", "7", "--set", "criterion=l1_norm"], 2, capsys)
    assert "criterion, search.seed differ" in line


def test_a_search_gives_one_json_document_and_keeps_progress_on_stderr(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = own_run / "runs" / "digits"
    before = read_trials(folder / "study.journal")
    assert run(["search", DIGITS, "--out", str(folder), *SHORT, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert {row["arm"] for row in result["summary"]} == {"search", "uniform", "global"}
    assert "search: " in captured.err
    assert read_trials(folder / "study.journal") == before  # resumed, nothing was evaluated again


def test_a_terminal_shows_stage_bar_rate_and_the_front_so_far(tiny: str, tmp_path: Path) -> None:
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, "-m", "autoprune.cli", "search", tiny, "--out", "live"]
    files, env = {"stdin": follower, "stdout": follower, "stderr": follower}, importing_alike()
    child = subprocess.Popen(command, cwd=tmp_path, env=env, **files)
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an error on Linux
        while chunk := os.read(leader, 65536):
            shown += chunk
    assert child.wait(timeout=200) == 0
    text = shown.decode()
    for word in ("control arms", "validation", "ETA", "/s", "front so far", "best point at each asked budget"):
        assert word in text
    assert "Traceback" not in text


def test_apply_reports_dense_and_pruned_scores_and_saves_the_model(
    finished_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    policy = str(finished_run / "runs" / "digits" / "policy.json")
    out = str(tmp_path / "small")
    assert run(["apply", policy, "--task", DIGITS, "--at", "macs=0.5", "--out", out, "--export", "pt2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["macs_ratio"] <= 0.5
    assert report["verification_error"] <= 1e-5
    assert report["test"]["dense"]["accuracy"] >= 0.98
    assert report["test"]["pruned"]["accuracy"] >= 0.8
    standing = {"model.safetensors", "policy.json", "apply.json", "README.md"}
    assert {Path(f).name for f in report["files"]} == {*standing, "model.pt2"}
    assert report["validation"]["loss"]["loss"] == pytest.approx(report["promised"]["loss"]["loss"], abs=1e-4)
    older = run(["apply", policy, "--task", DIGITS, "--at", "knee", "--finetune", "none", "--out", out, "--json"])
    assert older == 0
    assert {p.name for p in Path(out).iterdir()} == standing
    assert json.loads(capsys.readouterr().out)["recipe"] == {"recipe": "none"}
    line = fails(["apply", policy, "--task", DIGITS, "--at", "macs=0.01", "--out", out], 2, capsys)
    assert "the least it offers is macs=" in line
    for words in (("--finetune", "proxy", "--finetune-epochs", "1"), ("--finetune", "half"), ("--at", "macs=50")):
        fails(["apply", policy, "--task", DIGITS, "--at", "macs=0.5", "--out", out, *words], 2, capsys)
    fails(["apply", policy, "--task", DIGITS, "--at", "knee", "--out", str(Path(policy).parent)], 2, capsys)


def test_an_interrupted_search_ends_with_130_and_the_same_command_goes_on(tiny: str, tmp_path: Path) -> None:
    command = ("search", tiny, "--out", str(tmp_path / "run"), "--set", "search.trials=60")
    journal = tmp_path / "run" / "study.journal"
    process = autoprune_process(*command, "--set", "executor.kind=local", "--workers", "1", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not journal.exists() or journal.read_bytes().count(b"\n") < 12):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command goes on" in errors
    assert "Traceback" not in errors + output
    kept = journal.read_bytes()
    assert run([*command]) == 0
    assert journal.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
