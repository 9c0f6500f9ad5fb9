"""What the README and the examples promise runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RAY, ROOT, SMALL

README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS = [f"evaluator.{part}" for part in SMALL]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def python(cwd: Path, *arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_readme_fits_one_screen_or_so_and_shows_a_picture_that_exists() -> None:
    assert len(README.splitlines()) <= 140
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert (ROOT / picture).stat().st_size > 1000


def test_ci_runs_the_test_command_of_the_readme() -> None:
    (command,) = re.findall(r"^python3 -m venv .*pytest$", README, re.MULTILINE)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert command in ci.replace("pip install -q", "pip install")


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_every_python_snippet_of_the_readme_runs(index: int, finished_run: Path, tmp_path: Path) -> None:
    snippet = tmp_path / "snippet.py"
    snippet.write_text(SNIPPETS[index])
    assert python(finished_run, str(snippet)).strip()


def test_every_command_of_the_readme_is_understood(finished_run: Path) -> None:
    commands = re.findall(r"^autoprune (.*)$", README, re.MULTILINE)
    assert commands
    for command in commands:
        arguments = command.replace("search_spaces/", f"{ROOT}/search_spaces/").split()
        assert "test:" in python(finished_run, "-m", "autoprune.cli", *arguments)


def test_the_quickstart_prints_the_front(tmp_path: Path) -> None:
    output = python(tmp_path, str(ROOT / "examples" / "quickstart.py"), "run", "search.trials=8", *SETTINGS)
    assert re.search(r"^p\d+: 0\.\d+ of the MACs, kl ", output, re.MULTILINE)


def test_a_users_own_model_gets_smaller(tmp_path: Path) -> None:
    output = python(tmp_path, str(ROOT / "examples" / "own_model.py"), "run")
    assert "at 50% of the MACs" in output
    assert "Linear(in_features=64, out_features=128" not in output


def test_points_of_a_run_are_applied_from_python(finished_run: Path) -> None:
    output = python(finished_run, str(ROOT / "examples" / "apply_policy.py"), "runs/digits")
    assert output.startswith("macs=0.5: point p")
    assert (finished_run / "runs" / "digits" / "small" / "model.safetensors").exists()


def test_a_stock_agent_searches_in_the_environment(tmp_path: Path) -> None:
    output = python(tmp_path, str(ROOT / "examples" / "amc_agent.py"), str(ROOT / "search_spaces" / "digits.yaml"), "8")
    assert "of the MACs, KL " in output


def test_global_and_layerwise_pruning_are_compared_from_python(tmp_path: Path) -> None:
    output = python(tmp_path, str(ROOT / "examples" / "global_or_layerwise.py"), "run", "search.trials=6", *SETTINGS)
    verdicts = re.findall(r"^layer-wise (?:beat|did NOT beat) global at (0\.\d): (\w+)", output, re.MULTILINE)
    assert verdicts == [(at, name) for at in ("0.5", "0.3") for name in ("knapsack", "evolution")]
    assert "run/compare.csv has a row" in output
    assert len((tmp_path / "run" / "compare.csv").read_text(encoding="utf-8").splitlines()) == 1 + 4 * 2 * 2


@RAY
def test_a_users_own_tuner_searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")  # whatever clusters, dead ones too, this machine has word of
    output = python(tmp_path, str(ROOT / "examples" / "tune_search.py"), "run", "4")
    assert re.search(r"^0\.\d+ of the MACs, KL ", output, re.MULTILINE)
