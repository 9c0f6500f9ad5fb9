"""Worker processes on this machine, one thread each; a dead or hung one is replaced and its ask tried again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal

from autoprune.errors import InputError, RunError
from autoprune.evaluation import Ask, Evaluation
from autoprune.executors._asks import Asked, Asks, fewer
from autoprune.executors._worker import BOOT, SHARED
from autoprune.protocols import EvaluatorFactory, WorkerState

ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
IMPORTS_S = 60.0  # how long a worker may import, beside the time for an ask; torch alone takes seconds
OOM_COUNTER = Path("/proc/vmstat")
GRACE_S = 2.0  # how long a closing worker may take before it is killed


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    name: str
    awake: bool = False  # it has imported what it needs and builds its evaluator
    ready: bool = False
    asked: Asked | None = None
    since: float = 0.0
    done: int = 0
    busy_s: float = 0.0


class Local:
    """Long-lived worker processes.

    `make_evaluator` is pickled by name, so it must live in an importable module. An ask that takes longer than
    `timeout_s`, whose worker dies, or over which the evaluator raises is tried `retries` times more, then it is a
    failed evaluation. Building the evaluator may take as long. Workers die with this process, however it ends.
    """

    def __init__(
        self, make_evaluator: EvaluatorFactory, workers: int = 2, timeout_s: float = 600.0, retries: int = 2
    ) -> None:
        if workers < 1 or timeout_s <= 0 or retries < 0:
            raise InputError(f"executor: workers={workers}, timeout_s={timeout_s}, retries={retries} must be positive")
        function = getattr(make_evaluator, "func", make_evaluator)
        if getattr(function, "__module__", None) == "__main__":
            raise InputError("executor: workers cannot import what a script defines; put the factory into a module")
        self.slots = workers
        self._make_evaluator = make_evaluator
        self._timeout_s = timeout_s
        self._retries = retries
        self._asks = Asks(retries)
        self._stillborn = self._started = 0
        self._oom_kills = oom_kills()
        self._workers: list[_Worker] = []
        for _ in range(workers):
            self._workers.append(self._start())

    def submit(self, index: int, ask: Ask) -> None:
        """Hand `ask` to an idle worker, or queue it."""
        self._asks.submit(index, ask)
        self._dispatch()

    def next_done(self, timeout: float | None = None) -> tuple[int, Evaluation] | None:
        """The next result; None after `timeout` seconds, or at once where nothing is under way.

        Raises:
            InputError, RunError: the evaluator could not be built.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._asks.done:
            if not self._asks.waiting and all(w.asked is None for w in self._workers):
                return None
            self._turn(deadline)
            if not self._asks.done and deadline is not None and time.monotonic() >= deadline:
                return None
        return self._asks.done.popleft()

    def cancel(self, index: int) -> None:
        """Forget the ask; its result never comes. A worker that is at it is replaced."""
        self._asks.forget(index)
        for worker in list(self._workers):
            if worker.asked is not None and worker.asked.index == index:
                self._stop(worker)
        self._dispatch()

    def close(self) -> None:
        """Stop all workers."""
        self._asks.clear()
        for worker in self._workers:
            worker.connection.close()  # they leave when the socket closes
        for worker in list(self._workers):
            self._stop(worker, GRACE_S)

    def workers(self) -> tuple[WorkerState, ...]:
        """How each worker is doing."""
        return tuple(WorkerState(w.name, _state(w), w.done, w.busy_s) for w in self._workers)

    @property
    def retried(self) -> int:
        """Asks that had to be tried again so far."""
        return self._asks.retried

    def _turn(self, deadline: float | None) -> None:
        """Wait for one message, death or timeout, and deal with it."""
        ends = [w.since + self._patience_s(w) for w in self._workers if w.asked is not None or not w.ready]
        ends += [deadline] if deadline is not None else []
        patience = max(0.0, min(ends) - time.monotonic()) if ends else None
        heard = wait([w.connection for w in self._workers], patience)
        for worker in list(self._workers):
            if worker.connection in heard:
                self._hear(worker)
            elif (worker.asked is not None or not worker.ready) and _age(worker) > self._patience_s(worker):
                what = "answer" if worker.ready else "start (executor.timeout_s bounds that too)"
                self._lose(worker, f"no {what} within {self._patience_s(worker):g} s")
        self._dispatch()

    def _hear(self, worker: _Worker) -> None:
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError):
            self._lose(worker, self._death(self._stop(worker, GRACE_S)))
            return
        if kind == "broken":
            is_input, message = value
            self.close()
            raise InputError(message) if is_input else RunError(message)
        if kind == "awake":
            worker.awake, worker.since = True, time.monotonic()
        elif kind == "ready":
            worker.ready, self._stillborn = True, 0
        elif worker.asked is not None:
            asked, worker.asked = worker.asked, None
            worker.done, worker.busy_s = worker.done + 1, worker.busy_s + time.monotonic() - worker.since
            self._asks.answered(asked, kind, value)

    def _lose(self, worker: _Worker, reason: str) -> None:
        """Drop a dead or hung worker; its asked goes first in the queue, or fails after the last retry."""
        self._stop(worker)
        if not worker.ready:
            self._stillborn += 1
            if self._stillborn > self._retries + self.slots:
                self.close()
                raise RunError(f"workers are lost before they are ready: {reason}; their messages are on stderr")
        if worker.asked is not None:
            self._asks.again(worker.asked, Evaluation.failed(worker.asked.ask, reason))

    def _death(self, code: int) -> str:
        """Why a worker died; where the system killed it for lack of memory, it has no successor if others are left."""
        before, self._oom_kills = self._oom_kills, oom_kills()
        if code != -signal.SIGKILL or self._oom_kills == before:
            return f"the worker died ({_exit(code)})"
        self.slots, reason = fewer(self.slots, "the system killed a worker for lack of memory")
        return reason

    def _patience_s(self, worker: _Worker) -> float:
        """How long `worker` may take for what it is at: an ask or its evaluator, before them Python and its imports."""
        return self._timeout_s if worker.ready or worker.awake else self._timeout_s + IMPORTS_S

    def _dispatch(self) -> None:
        while self._asks.waiting and len(self._workers) < self.slots:
            self._workers.append(self._start())
        for worker in list(self._workers):
            if self._asks.waiting and worker.ready and worker.asked is None:
                worker.asked, worker.since = self._asks.waiting.popleft(), time.monotonic()
                # where it is dead already, the next read says so and the asked is tried again
                with contextlib.suppress(OSError):
                    worker.connection.send(worker.asked.ask)

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            process = _process(theirs)
        connection = Connection(ours.detach())
        worker = _Worker(process, connection, f"worker-{self._started}", since=time.monotonic())
        self._started += 1
        try:
            with contextlib.suppress(OSError):  # it died already; the next read says so
                connection.send(self._make_evaluator)
        except Exception as error:
            self._stop(worker)
            raise InputError(f"executor: the evaluator's factory cannot be sent to workers: {error}") from error
        return worker

    def _stop(self, worker: _Worker, grace_s: float = 0.0) -> int:
        """End the process, after `grace_s` by force, and forget it; its exit status."""
        if worker in self._workers:
            self._workers.remove(worker)
        try:
            worker.process.wait(grace_s or 0.001)
        except subprocess.TimeoutExpired:
            worker.process.kill()
        worker.connection.close()
        return worker.process.wait()


def _process(theirs: socket.socket) -> subprocess.Popen[bytes]:
    """A worker process at the other end of a socket; its stdout is our stderr, for stdout holds tables and JSON."""
    environment, command = {**os.environ, **dict.fromkeys(ONE_THREAD, "1")}, [sys.executable, "-c", BOOT]
    command.append(json.dumps(sys.path))
    if sys.platform != "win32":
        descriptor = theirs.fileno()
        command.append(str(descriptor))
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[descriptor])
    process = subprocess.Popen([*command, SHARED], env=environment, stdin=subprocess.PIPE, stdout=2)
    assert process.stdin is not None
    with process.stdin as line:  # no descriptor can be passed on there
        line.write(theirs.share(process.pid))
    return process


def _age(worker: _Worker) -> float:
    return time.monotonic() - worker.since


def _state(worker: _Worker) -> Literal["starting", "idle", "busy"]:
    if not worker.ready:
        return "starting"
    return "idle" if worker.asked is None else "busy"


def oom_kills() -> int:
    """How many processes this machine has killed for lack of memory so far; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in OOM_COUNTER.read_text(encoding="ascii").splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit {code}"
