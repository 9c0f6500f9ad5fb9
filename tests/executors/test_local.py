"""Worker processes die, hang, outlive nobody, and use one thread."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from autoprune.errors import InputError, RunError
from autoprune.evaluation import Ask, Evaluation
from autoprune.executors.local import Local
from autoprune.files.job_parts import ExecutorPart
from autoprune.policy import Policy
from autoprune.protocols import Evaluator
from tests.conftest import until
from tests.synthetic import Hills, MakeHills, chain

STRUCTURE = chain(2)
ASK = Ask(Policy.dense(STRUCTURE), "refit")


def environment() -> Evaluator:
    return tell_environment


def tell_environment(ask: Ask) -> Evaluation:
    print("this must not reach stdout")
    import torch

    threads = {"torch": torch.get_num_threads(), "omp": int(os.environ["OMP_NUM_THREADS"])}
    return Evaluation(ask, 1.0, metrics={**threads, "pid": os.getpid()})


def answer(executor: Local) -> Evaluation:
    executor.submit(0, ASK)
    done = executor.next_done()
    assert done is not None
    return done[1]


def test_a_factory_that_cannot_be_sent_is_an_input_error() -> None:
    with pytest.raises(InputError, match="cannot be sent to workers"):
        Local(lambda: Hills(STRUCTURE))


def test_workers_use_one_thread_and_leave_stdout_alone(capfd: pytest.CaptureFixture[str]) -> None:
    with closing(Local(environment, workers=1)) as executor:
        metrics = answer(executor).metrics
    assert (metrics["torch"], metrics["omp"]) == (1, 1)
    assert metrics["pid"] != os.getpid()
    assert capfd.readouterr().out == ""


def test_closing_leaves_no_process_behind() -> None:
    executor = Local(MakeHills(STRUCTURE, seconds=30), workers=2)
    processes = [w.process for w in executor._workers]
    executor.submit(0, ASK)
    executor.close()
    assert [p.poll() is not None for p in processes] == [True, True]


def at_work(executor: Local) -> subprocess.Popen[bytes]:
    """The process that has an ask."""
    until(lambda: executor.next_done(timeout=0.01) or any(w.asked for w in executor._workers))
    return next(w.process for w in executor._workers if w.asked)


def test_a_worker_that_is_killed_for_memory_is_told_as_that_and_one_fewer_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = tmp_path / "vmstat"
    counter.write_text("pgfault 5\noom_kill 3\n")
    monkeypatch.setattr("autoprune.executors.local.OOM_COUNTER", counter)
    with closing(Local(MakeHills(STRUCTURE, seconds=1), workers=2, retries=3)) as executor:
        executor.submit(0, ASK)
        busy = at_work(executor)
        counter.write_text("pgfault 9\noom_kill 4\n")
        busy.kill()
        with pytest.warns(UserWarning, match=r"for lack of memory: 1 worker goes on; lower evaluator\.calibration"):
            done = executor.next_done()
        assert done is not None
        assert done[1].ok
        assert (executor.slots, executor.retried, len(executor._workers)) == (1, 1, 1)


def test_a_worker_that_somebody_else_kills_has_a_successor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprune.executors.local.OOM_COUNTER", tmp_path / "no such file")
    with closing(Local(MakeHills(STRUCTURE, seconds=1), workers=1, retries=0)) as executor:
        executor.submit(0, ASK)
        at_work(executor).kill()
        done = executor.next_done()
        assert done is not None
        assert done[1].error == "the worker died (signal 9)"
        assert (executor.slots, answer(executor).ok) == (1, True)


@pytest.fixture
def script(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A user's script without any `if __name__` guard, whose workers are busy for a minute."""
    (tmp_path / "script.py").write_text(
        "import sys; from tests.synthetic import MakeHills, chain\n"
        "from autoprune.executors.local import Local; from autoprune.evaluation import Ask\n"
        "from autoprune.policy import Policy\n"
        "structure = chain(2)\n"
        "executor = Local(MakeHills(structure, seconds=60, log=sys.argv[1]), workers=2)\n"
        "for index in range(2): executor.submit(index, Ask(Policy.dense(structure), 'refit'))\n"
        "print(*[w.process.pid for w in executor._workers], flush=True)\n"
        "executor.next_done()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "log")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        yield process
        with contextlib.suppress(ProcessLookupError):
            process.kill()


def test_workers_die_with_a_parent_that_was_killed(script: subprocess.Popen[bytes], tmp_path: Path) -> None:
    assert script.stdout is not None
    pids = [int(pid) for pid in script.stdout.readline().split()]
    until(lambda: (tmp_path / "log").exists() and len((tmp_path / "log").read_text().splitlines()) == 2)
    script.kill()
    script.wait()
    until(lambda: not any(_alive(pid) for pid in pids))
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def hanging() -> Evaluator:
    time.sleep(60)
    raise AssertionError


def test_a_worker_that_hangs_while_it_builds_is_tried_again_and_then_told_in_one_line() -> None:
    with closing(Local(hanging, workers=1, timeout_s=0.3, retries=0)) as executor:
        executor.submit(0, ASK)
        with pytest.raises(
            RunError, match=r"lost before they are ready: no start \(executor\.timeout_s .*within 0\.3 s"
        ):
            executor.next_done(timeout=60)


def test_auto_takes_the_machines_cores_where_the_system_does_not_say_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    assert ExecutorPart().n_workers == 7
