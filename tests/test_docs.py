"""What the README and the examples promise runs as it stands."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from autoprune.cli import run
from autoprune.files.policy_file import load_front
from tests.conftest import RAY, ROOT, SETTINGS

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def shorter(text: str) -> str:
    """The same program; a search that is in it gets few trials and few steps."""
    few = '{"trials": 4}, "evaluator": {"finalists": 1, "finetune_steps": 5}'
    found, n = re.subn(r'\{"trials": \d+\}', few, text)
    assert n == text.count(".search(")
    return found


def python(cwd: Path, *arguments: str) -> str:
    """What a program prints in a process of its own."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a script prints, run from its first line to its last in this process, where torch is imported already."""

    def printed(cwd: Path, path: Path, *arguments: str) -> str:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return printed


def test_the_readme_fits_one_screen_or_so_and_shows_a_picture_that_exists() -> None:
    assert len(README.splitlines()) <= 140
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert (ROOT / picture).stat().st_size > 1000


def test_ci_runs_the_test_command_of_the_readme() -> None:
    (command,) = re.findall(r"^python3 -m venv .*pytest$", README, re.MULTILINE)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert command in ci.replace("pip install -q", "pip install")


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_every_python_snippet_of_the_readme_runs(
    index: int, own_run: Path, tmp_path: Path, script: Callable[..., str]
) -> None:
    snippet = tmp_path / "snippet.py"
    snippet.write_text(shorter(SNIPPETS[index]))
    assert script(own_run, snippet).strip()


def test_every_command_of_the_readme_is_understood(
    own_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(own_run)
    commands = re.findall(r"^autoprune (.*)$", README, re.MULTILINE)
    assert commands
    for command in commands:
        arguments = command.replace("search_spaces/", f"{ROOT}/search_spaces/").split()
        assert run(arguments) == 0
        assert "on the test split" in capsys.readouterr().out


@pytest.mark.parametrize("command", re.findall(r"^autoprune (.*)$", COMMANDS, re.MULTILINE))
def test_every_command_that_shows_something_again_runs(
    command: str, finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished_run)
    assert run(command.split()) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert captured.err == ""
    if command.endswith("--json"):
        json.loads(captured.out)


def test_the_lines_of_doctor_are_those_of_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    shown = re.findall(r"^(\w[\w:]*(?: [\w:]+)*) {2,}", capsys.readouterr().out.partition("\nextras")[0], re.MULTILINE)
    table = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", COMMANDS, re.MULTILINE)[1:]
    assert shown == [name for row in table for name in row.split(", ") if name != "extras"]


def test_a_front_shows_itself_in_python(finished_run: Path, tmp_path: Path, script: Callable[..., str]) -> None:
    (text,) = re.findall(r"```python\n(.*?)```", COMMANDS, re.DOTALL)
    (tmp_path / "snippet.py").write_text(text)
    output = script(finished_run, tmp_path / "snippet.py").splitlines()
    front = load_front(finished_run / "runs" / "digits" / "policy.json")
    assert output[:2] == [repr(front), repr(front.select("knee"))]
    assert [line.split()[0] for line in output if re.match(r"p\d+ ", line)] == [point.id for point in front]


def test_the_quickstart_goes_on_with_a_run_and_prints_its_front(own_run: Path, script: Callable[..., str]) -> None:
    output = script(own_run, ROOT / "examples" / "quickstart.py", "runs/digits", *SETTINGS)
    assert re.search(r"^search [\d.]+/[\d.]+: loss ", output, re.MULTILINE)
    points = re.findall(r"^(p\d+): 0\.\d+ of the MACs, kl ", output, re.MULTILINE)
    assert points == [point.id for point in load_front(own_run / "runs" / "digits" / "policy.json")]


def test_a_users_own_model_gets_smaller(tmp_path: Path, script: Callable[..., str]) -> None:
    example = tmp_path / "own_model.py"
    example.write_text(shorter((ROOT / "examples" / example.name).read_text(encoding="utf-8")), encoding="utf-8")
    output = script(tmp_path, example, "run")
    assert "at 50% of the MACs" in output
    assert "Linear(in_features=64, out_features=128" not in output


def test_points_of_a_run_are_applied_from_python(own_run: Path, script: Callable[..., str]) -> None:
    output = script(own_run, ROOT / "examples" / "apply_policy.py", "runs/digits")
    assert output.startswith("macs=0.5: point p")
    assert (own_run / "runs" / "digits" / "small" / "model.safetensors").exists()


def test_a_stock_agent_searches_in_the_environment(tmp_path: Path, script: Callable[..., str]) -> None:
    output = script(tmp_path, ROOT / "examples" / "amc_agent.py", str(ROOT / "search_spaces" / "digits.yaml"), "8")
    assert "of the MACs, KL " in output


def test_global_and_layerwise_pruning_are_compared_from_python(tmp_path: Path, script: Callable[..., str]) -> None:
    output = script(tmp_path, ROOT / "examples" / "global_or_layerwise.py", "run", *SETTINGS, "search.trials=4")
    verdicts = re.findall(r"^layer-wise (?:beat|did NOT beat) global at (0\.\d): (\w+)", output, re.MULTILINE)
    assert verdicts == [(at, name) for at in ("0.5", "0.3") for name in ("knapsack", "evolution")]
    assert "run/compare.csv has a row" in output
    assert len((tmp_path / "run" / "compare.csv").read_text(encoding="utf-8").splitlines()) == 1 + 4 * 2 * 2


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skips where one of them is not installed."""
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(lacking), reason=f"not installed: {', '.join(lacking)}")


def test_a_loop_of_ones_own_trains_what_was_cut(own_run: Path, script: Callable[..., str]) -> None:
    output = script(own_run, ROOT / "examples" / "production_loop.py", "runs/digits", *SETTINGS)
    before, after = map(float, re.findall(r"accuracy (0\.\d+) as cut, (0\.\d+) trained", output)[0])
    assert after >= before - 0.02
    assert (own_run / "runs" / "digits" / "trained" / "model.safetensors").exists()


@needs("lightning")
def test_lightning_trains_a_pruned_model(own_run: Path) -> None:
    output = python(own_run, str(ROOT / "examples" / "lightning_finetune.py"), "runs/digits")
    assert re.search(r"^p\d+: test accuracy 0\.\d+ after \d+ steps of Lightning$", output, re.MULTILINE)
    assert (own_run / "runs" / "digits" / "trained" / "model.safetensors").exists()


@needs("transformers", "accelerate")
def test_the_trainer_of_transformers_trains_a_pruned_bert(tmp_path: Path) -> None:
    example = tmp_path / "hf_trainer.py"
    text = shorter_job((ROOT / "examples" / example.name).read_text(encoding="utf-8"))
    example.write_text(text, encoding="utf-8")
    output = python(tmp_path, str(example), "out")
    before, after = map(float, re.findall(r"accuracy (0\.\d+) as cut, (\d\.\d+) after the Trainer", output)[0])
    assert after > before
    assert (tmp_path / "out" / "small" / "config.json").exists()


def shorter_job(text: str) -> str:
    """The same program, whose job has few trials."""
    found, n = re.subn(r'"trials": \d+', '"trials": 4', text)
    assert n == 1
    return found


@RAY
def test_a_users_own_tuner_searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")  # whatever clusters, dead ones too, this machine has word of
    output = python(tmp_path, str(ROOT / "examples" / "tune_search.py"), "run", "4")
    assert re.search(r"^0\.\d+ of the MACs, KL ", output, re.MULTILINE)
