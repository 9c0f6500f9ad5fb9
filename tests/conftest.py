"""What tests share: a short, real run of the digits job, a Ray of one's own, and who runs beside whom."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch comes: two test processes fill two cores, as workers do
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # on loopback, and no token is left in a developer's home
ROOT = Path(__file__).parents[1]
RAY = pytest.mark.xdist_group("ray")
"""Tests that start Ray run one after the other: agents of two Rays on one machine claim the same ports."""
SHORT = ("--trials", "16", "--workers", "1", "--set", "evaluator.finetune_steps=5", "--set", "evaluator.finalists=2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests share fixtures and so a process, unless they say otherwise."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """A Ray of this process's own, for as long as a module's tests last."""
    import ray

    from autoprune.executors._ray_cluster import connect

    connect("local")
    yield
    ray.shutdown()


def autoprune_process(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """The command line in a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "autoprune.cli", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear_interrupts)


def importing_alike() -> dict[str, str]:
    """The environment of a Python process that finds the modules that this one finds, those of tests/ too."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for `condition`; AssertionError where it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def hear_interrupts() -> None:
    """A shell starts background jobs deaf to SIGINT, and their children inherit it; a user's terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `autoprune search digits.yaml` has left runs/digits/."""
    folder = tmp_path_factory.mktemp("user")
    process = autoprune_process("search", str(ROOT / "search_spaces" / "digits.yaml"), *SHORT, cwd=folder)
    output, errors = process.communicate(timeout=300)
    (folder / "stdout.txt").write_text(output, encoding="utf-8")
    assert process.returncode == 0, errors
    return folder
