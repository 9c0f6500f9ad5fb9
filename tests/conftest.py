"""What tests share: a short, real run of the digits job, a Ray of one's own, and who runs beside whom."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch comes: two test processes fill two cores, as workers do
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # on loopback, and no token is left in a developer's home
ROOT = Path(__file__).parents[1]
RAY = pytest.mark.xdist_group("ray")
"""Tests that start Ray run one after the other: agents of two Rays on one machine claim the same ports."""
SMALL = ("calibration=160", "validation=100", "sensitivity=2", "finetune_steps=5", "finalists=2")
SETTINGS = ("search.trials=16", "executor.kind=inline", *(f"evaluator.{part}" for part in SMALL))
SHORT = tuple(word for setting in SETTINGS for word in ("--set", setting))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests share fixtures and so a process, unless they say otherwise; Ray may leave files open."""
    for item in items:
        group = item.get_closest_marker("xdist_group")
        if group is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
        elif group == RAY.mark:
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Ray of a head and a node of four slots, joined by this process; all tests that need one share it."""
    import ray

    from tests.ray_clusters import start_cluster, stop_cluster

    cluster, _ = start_cluster(4)
    ray.init(cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    stop_cluster(cluster)


def autoprune_process(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """The command line in a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "autoprune.cli", *arguments]
    pipe = subprocess.PIPE
    own = {"cwd": cwd, "env": importing_alike(), "preexec_fn": hear_interrupts}
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **own)


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
    """A folder in which `autoprune search digits.yaml` has left runs/digits/; all processes share it and only read."""
    return made_once(tmp_path_factory, "user", search_digits)


@pytest.fixture
def own_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of `finished_run` of one's own, to go on with or to write into."""
    return shutil.copytree(finished_run, tmp_path / "user")


def search_digits(folder: Path) -> None:
    """What `finished_run` holds."""
    process = autoprune_process("search", str(ROOT / "search_spaces" / "digits.yaml"), *SHORT, cwd=folder)
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()  # one that runs into its limit would go on
    (folder / "stdout.txt").write_text(output, encoding="utf-8")
    assert process.returncode == 0, errors


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` has filled, once for all processes of a test session: the others wait for it."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            draft = folder.with_suffix(".part")
            shutil.rmtree(draft, ignore_errors=True)  # of a process in which `make` failed
            draft.mkdir()
            make(draft)
            draft.rename(folder)
    return folder
