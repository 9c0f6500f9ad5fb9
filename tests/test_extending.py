"""The examples of docs/extending.md: the contracts find each new file, and a job leads all of them the whole way."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from autoprune import plugins
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FOUND = re.findall(r"`(\w+)/(\w+)\.py`:\n\n```python\n(.*?)```", TEXT, re.DOTALL)
EXAMPLES = {(folder, name): code for folder, name, code in FOUND}
(JOB,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
VERBS = """
from autoprune.cli import run
assert run(["search", "job.yaml", "--out", "run"]) == 0
there = ["--task", "job.yaml", "--out", "small", "--finetune", "full", "--finetune-epochs", "2"]
assert run(["apply", "run/policy.json", "--at", "peak=0.6", "--export", "just_weights", *there]) == 0
alone = ["--set", "objectives.costs=[peak]", "--set", "search.trials=4"]
assert run(["compare", "job.yaml", "--strategies", "tapered,walker", "--seeds", "1", "--out", "compared", *alone]) == 0
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and of its contracts, with the examples in their folders."""
    folder = tmp_path_factory.mktemp("house")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "autoprune", folder / "autoprune", ignore=ignored)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for (room, name), code in EXAMPLES.items():
        path = folder / "autoprune" / room / f"{name}.py"
        assert not path.exists()
        path.write_text(code, encoding="utf-8")
    (folder / "job.yaml").write_text(JOB, encoding="utf-8")
    return folder


def python(house: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(house), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


def test_every_seam_has_an_example_and_a_line_in_the_table() -> None:
    assert sorted(folder for folder, _ in EXAMPLES) == sorted(plugins.FOLDERS)
    lines = re.findall(r"^\| (\w+) \|", TEXT, re.MULTILINE)[1:]
    assert sorted(lines) == sorted(plugins.SINGULAR.get(f, f.removesuffix("s")).split()[0] for f in plugins.FOLDERS)


def test_the_contracts_test_a_new_file_without_being_told(house: Path) -> None:
    names = " or ".join(name for _, name in EXAMPLES)
    output = python(house, "-m", "pytest", "tests/contracts", "-n", "0", "-p", "no:cacheprovider", "-vv", "-k", names)
    passed = set(re.findall(r"test_(\w+)\.py::\S.* PASSED", output))
    assert passed == set(plugins.FOLDERS), output


def test_the_job_of_the_examples_goes_all_the_way(house: Path) -> None:
    python(house, "-c", VERBS)
    policy = json.loads((house / "run" / "policy.json").read_text(encoding="utf-8"))
    assert policy["space"]["criterion"] == {"name": "by_index", "options": {"first": "low"}}
    assert all(point["costs"]["peak"] <= 0.9 * policy["base"]["costs"]["peak"] for point in policy["points"])
    assert all(point["losses"]["validation"]["name"] == "huber" for point in policy["points"])
    assert (house / "small" / "model.weights.pt").exists()
    assert policy["measured_on"]["runtime"] == "bfloat16"
    assert (house / "compared" / "compare.csv").read_text(encoding="utf-8").count("\n") == 3
