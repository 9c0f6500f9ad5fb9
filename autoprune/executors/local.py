"""Worker processes on this machine, one thread each; a dead or hung one is replaced and its ask tried again."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Literal

from autoprune.errors import InputError, RunError
from autoprune.evaluation import Ask, Evaluation
from autoprune.executors._tasks import Task, Tasks
from autoprune.executors._worker import BOOT
from autoprune.protocols import EvaluatorFactory, WorkerState

ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
GRACE_S = 2.0  # how long a closing worker may take before it is killed


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    name: str
    ready: bool = False
    task: Task | None = None
    since: float = 0.0
    done: int = 0
    busy_s: float = 0.0


class Local:
    """Long-lived worker processes.

    `make_evaluator` is pickled by name, so it must live in an importable module. An ask that takes longer than
    `timeout_s`, whose worker dies, or over which the evaluator raises is tried `retries` times more, then it is a
    failed evaluation. Workers die with this process, however it ends.
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
        self._tasks = Tasks(retries)
        self._stillborn = self._started = 0
        self._workers: list[_Worker] = []
        for _ in range(workers):
            self._workers.append(self._start())

    def submit(self, index: int, ask: Ask) -> None:
        """Hand `ask` to an idle worker, or queue it."""
        self._tasks.submit(index, ask)
        self._dispatch()

    def next_done(self, timeout: float | None = None) -> tuple[int, Evaluation] | None:
        """The next result; None after `timeout` seconds, or at once where nothing is under way.

        Raises:
            InputError, RunError: the evaluator could not be built.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._tasks.done:
            if not self._tasks.waiting and all(w.task is None for w in self._workers):
                return None
            self._turn(deadline)
            if not self._tasks.done and deadline is not None and time.monotonic() >= deadline:
                return None
        return self._tasks.done.popleft()

    def cancel(self, index: int) -> None:
        """Forget the ask; its result never comes. A worker that is at it is replaced."""
        self._tasks.forget(index)
        for worker in list(self._workers):
            if worker.task is not None and worker.task.index == index:
                self._stop(worker)
        self._dispatch()

    def close(self) -> None:
        """Stop all workers."""
        self._tasks.clear()
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
        return self._tasks.retried

    def _turn(self, deadline: float | None) -> None:
        """Wait for one message, death or timeout, and deal with it."""
        ends = [w.since + self._timeout_s for w in self._workers if w.task is not None]
        ends += [deadline] if deadline is not None else []
        patience = max(0.0, min(ends) - time.monotonic()) if ends else None
        heard = wait([w.connection for w in self._workers], patience)
        for worker in list(self._workers):
            if worker.connection in heard:
                self._hear(worker)
            elif worker.task is not None and time.monotonic() - worker.since > self._timeout_s:
                self._lose(worker, f"no answer within {self._timeout_s:g} s")
        self._dispatch()

    def _hear(self, worker: _Worker) -> None:
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError):
            self._lose(worker, f"the worker died ({_exit(self._stop(worker, GRACE_S))})")
            return
        if kind == "broken":
            is_input, message = value
            self.close()
            raise InputError(message) if is_input else RunError(message)
        if kind == "ready":
            worker.ready, self._stillborn = True, 0
        elif worker.task is not None:
            task, worker.task = worker.task, None
            worker.done, worker.busy_s = worker.done + 1, worker.busy_s + time.monotonic() - worker.since
            self._tasks.answered(task, kind, value)

    def _lose(self, worker: _Worker, reason: str) -> None:
        """Drop a dead or hung worker; its task goes first in the queue, or fails after the last retry."""
        self._stop(worker)
        if not worker.ready:
            self._stillborn += 1
            if self._stillborn > self._retries + self.slots:
                self.close()
                raise RunError(f"workers die before they are ready: {reason}; their messages are on stderr")
        if worker.task is not None:
            self._tasks.again(worker.task, Evaluation.failed(worker.task.ask, reason))

    def _dispatch(self) -> None:
        while self._tasks.waiting and len(self._workers) < self.slots:
            self._workers.append(self._start())
        for worker in list(self._workers):
            if self._tasks.waiting and worker.ready and worker.task is None:
                worker.task, worker.since = self._tasks.waiting.popleft(), time.monotonic()
                # where it is dead already, the next read says so and the task is tried again
                with contextlib.suppress(OSError):
                    worker.connection.send(worker.task.ask)

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, **dict.fromkeys(ONE_THREAD, "1")}
        command = [sys.executable, "-c", BOOT, json.dumps(sys.path), str(theirs.fileno())]
        with theirs:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout is the caller's, for its tables and JSON
                pass_fds=[theirs.fileno()],
            )
        connection = Connection(ours.detach())
        worker = _Worker(process, connection, f"worker-{self._started}")
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


def _state(worker: _Worker) -> Literal["starting", "idle", "busy"]:
    if not worker.ready:
        return "starting"
    return "idle" if worker.task is None else "busy"


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit {code}"
