"""Actors on a Ray cluster, one for each slot; lost or hung ones are replaced and their asks tried again."""

from __future__ import annotations

import gc
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.util.metrics import Counter

from autoprune.errors import InputError, RunError, one_line
from autoprune.evaluation import Ask, Evaluation
from autoprune.executors._asks import Asked, Asks, fewer
from autoprune.executors._ray_cluster import check_room, connect, demand, put, spread
from autoprune.executors._worker import answer, broken, one_thread
from autoprune.protocols import Evaluator, EvaluatorFactory, WorkerState

PATIENCE_S = 60.0
"""After so long without any worker the user is told that the cluster has no room."""
IMPORTS_S = 60.0
"""How long a worker may import, beside the time for an ask."""
GRACE_S = 2.0
"""How long a worker may take to let go of its evaluator."""
_COUNT = count()  # names of actors must differ between the executors of a process
LOGS = "the workers' own messages are in Ray's logs and its dashboard"


@dataclass(frozen=True)
class _Sent:
    """What an actor was sent and has not answered: its start (no asked), or an ask."""

    reference: Any
    asked: Asked | None = None


@dataclass(eq=False)
class _Worker:
    actor: Any
    name: str
    sent: deque[_Sent]  # it is at the first; what follows is there already when that one is answered
    since: float = field(default_factory=time.monotonic)
    node: str = ""
    awake: bool = False  # it has found room and builds its evaluator
    ready: bool = False
    done: int = 0
    busy_s: float = 0.0

    @property
    def asks(self) -> list[Asked]:
        """The asks it was sent, the one it is at first."""
        return [s.asked for s in self.sent if s.asked is not None]


class Ray:
    """Long-lived actors, each with its own evaluator; data and models lie once a node in Ray's object store.

    `make_evaluator` goes to the object store with its tensors as plain arrays, which the actors of a node read in
    place; what it refers to must be importable there (`runtime_env`). What travels for an ask is the ask. As many
    actors as `workers` are asked for: those that find no room yet start when a node joins. While more asks wait than
    there are workers, an actor gets its next one before it has answered the last. An ask that takes longer than
    `timeout_s`, whose actor or node is lost, or over which the evaluator raises is tried `retries` times more,
    then it is a failed evaluation.

    `address` is that of a running cluster ("auto", host:port), or "local" for one of this process's own.
    `resources` is what a worker takes: cpu, gpu (fractions too), and custom resources by their name.

    Raises:
        InputError: no cluster at the address, or no node of it that could ever hold a worker.
    """

    travels = True

    def __init__(  # the keys of the job's executor section
        self,
        make_evaluator: EvaluatorFactory,
        workers: int = 2,
        timeout_s: float = 600.0,
        retries: int = 2,
        *,
        address: str | None = None,
        resources: Mapping[str, float] | None = None,
        runtime_env: Mapping[str, Any] | None = None,
    ) -> None:
        if workers < 1 or timeout_s <= 0 or retries < 0:
            raise InputError(f"executor: workers={workers}, timeout_s={timeout_s}, retries={retries} must be positive")
        Ray.check(address, resources, runtime_env)
        self.slots = workers
        self._timeout_s, self._retries = timeout_s, retries
        self._asks = Asks(retries)
        self._actor, self._demand = ray.remote(_Actor), demand(resources)
        self._stillborn = self._started = 0
        self._since, self._label = time.monotonic(), f"{os.getpid()}.{next(_COUNT)}"
        self._metrics = _Metrics()
        self._parcel = put(make_evaluator)
        self._workers: list[_Worker] = []
        for _ in range(workers):
            self._start()

    @staticmethod
    def check(
        address: str | None = None,
        resources: Mapping[str, float] | None = None,
        runtime_env: Mapping[str, Any] | None = None,
    ) -> None:
        """Connect to the cluster, unless this process is connected, and see that a worker could be placed.

        Raises:
            InputError: one line on what is wrong and what to try.
        """
        if not ray.is_initialized():
            connect(address or "auto", runtime_env)
        check_room(resources)

    @staticmethod
    def each(
        function: Callable[[Any], Any],
        items: Iterable[tuple[int, Any]],
        *,
        address: str | None = None,
        resources: Mapping[str, float] | None = None,
        runtime_env: Mapping[str, Any] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Work that is no ask, anywhere on the cluster: (number, what `function` gives for the item), as they come.

        Raises:
            InputError: as the function says, or as `check` does.
            RunError: the cluster is lost, or an item cost several nodes their lives.
        """
        Ray.check(address, resources, runtime_env)
        yield from spread(function, items, resources)

    def submit(self, index: int, ask: Ask) -> None:
        """Send `ask` to an idle actor, or queue it."""
        self._asks.submit(index, ask)
        self._dispatch()

    def next_done(self, timeout: float | None = None) -> tuple[int, Evaluation] | None:
        """The next result; None after `timeout` seconds, or at once where nothing is under way.

        Raises:
            InputError, RunError: the evaluator could not be built, or the cluster is gone.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while not self._asks.done:
                if not self._asks.waiting and not any(w.asks for w in self._workers):
                    return None
                self._turn(deadline)
                if not self._asks.done and deadline is not None and time.monotonic() >= deadline:
                    return None
        except (RayError, ConnectionError) as error:
            raise RunError(
                f"the Ray cluster is lost: {one_line(error)}; what was finished is kept, and the same command goes on"
            ) from error
        return self._asks.done.popleft()

    def cancel(self, index: int) -> None:
        """Forget the ask; its result never comes. An actor that was sent it is replaced."""
        self._asks.forget(index)
        for worker in list(self._workers):
            if any(asked.index == index for asked in worker.asks):
                self._stop(worker)
                self._asks.unsend([asked for asked in worker.asks if asked.index != index])
                self._start()
        self._dispatch()

    def close(self) -> None:
        """Stop all actors; the connection stays for whoever comes next. Idle ones let go of what they hold first."""
        self._asks.clear()
        with suppress(RayError, ConnectionError):
            self._let_go()
        for worker in list(self._workers):
            self._stop(worker)
        self._parcel = None

    def workers(self) -> tuple[WorkerState, ...]:
        """How each actor is doing, under the name by which Ray's dashboard shows it."""
        return tuple(WorkerState(w.name, _state(w), w.done, w.busy_s, w.node) for w in self._workers)

    @property
    def retried(self) -> int:
        """Asks that had to be tried again so far."""
        return self._asks.retried

    def _turn(self, deadline: float | None) -> None:
        """Wait for an answer, a start, a death or a timeout, and deal with all that have come."""
        ends = [w.since + self._patience_s(w) for w in self._workers if w.asks or (w.awake and not w.ready)]
        ends += [deadline] if deadline is not None else []
        ends += [self._since + PATIENCE_S] if not ends else []
        at = {w.sent[0].reference: w for w in self._workers if w.sent}
        patience = max(0.0, min(ends) - time.monotonic())
        heard, rest = ray.wait(list(at), num_returns=1, timeout=patience)
        if heard and rest:
            heard += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        for reference in heard:
            self._hear(at[reference])
        for worker in list(self._workers):
            busy = worker.asks or (worker.awake and not worker.ready)
            if busy and time.monotonic() - worker.since > self._patience_s(worker):
                what = "answer" if worker.ready else "start (executor.timeout_s bounds that too)"
                self._lose(worker, f"no {what} within {self._patience_s(worker):g} s")
        if not any(w.ready for w in self._workers) and time.monotonic() - self._since > PATIENCE_S:
            self._since = time.monotonic()
            warnings.warn(f"the Ray cluster has had no room for a worker in {PATIENCE_S:g} s; waiting", stacklevel=2)
        self._dispatch()

    def _hear(self, worker: _Worker) -> None:
        try:
            kind, value = ray.get(worker.sent[0].reference)
        except OutOfMemoryError:  # Ray's memory monitor ends workers before the node's system does
            self.slots, reason = fewer(self.slots, "Ray ended a worker because its node runs out of memory")
            self._lose(worker, reason)
            return
        except RayActorError as error:
            self._lose(worker, f"the worker died ({_death(error)})")
            return
        except RayError as error:  # an answer that cannot be read, a runtime_env that cannot be set up
            self._lose(worker, f"the worker failed ({one_line(error)})")
            return
        if kind == "broken":
            is_input, message = value
            self.close()
            raise InputError(message) if is_input else RunError(message)
        asked, spent_s = worker.sent.popleft().asked, time.monotonic() - worker.since
        worker.since = time.monotonic()
        if kind == "awake":
            worker.awake, worker.node = True, value
            return
        if asked is None:
            worker.ready, worker.node, self._stillborn = True, value, 0
            return
        worker.done, worker.busy_s = worker.done + 1, worker.busy_s + spent_s
        self._metrics.answered(worker.name, spent_s)
        if kind == "raised":
            self._metrics.lost(worker.name)
        self._asks.answered(asked, kind, value)

    def _let_go(self) -> None:
        """Have the idle workers let go of their evaluators."""
        under_way = [s.reference for w in self._workers for s in w.sent]
        busy = ray.wait(under_way, num_returns=len(under_way), timeout=0)[1] if under_way else []
        idle = [w for w in self._workers if not any(s.reference in busy for s in w.sent)]
        if leaving := [w.actor.leave.remote() for w in idle]:
            ray.wait(leaving, num_returns=len(leaving), timeout=GRACE_S)

    def _lose(self, worker: _Worker, reason: str) -> None:
        """Replace a dead or hung actor; its ask goes first in the queue, or fails after the last retry."""
        self._stop(worker)
        if not worker.ready:
            self._stillborn += 1
            if self._stillborn > self._retries + self.slots:
                self.close()
                raise RunError(f"workers are lost before they are ready: {reason}; {LOGS}")
        self._asks.unsend(worker.asks[1:])  # it had not begun these
        for asked in worker.asks[:1]:
            self._metrics.lost(worker.name)
            self._asks.again(asked, Evaluation.failed(asked.ask, reason))
        if len(self._workers) < self.slots:
            self._start()

    def _patience_s(self, worker: _Worker) -> float:
        """How long `worker` may take for what it is at: an ask, or its evaluator and the imports of that."""
        return self._timeout_s if worker.ready else self._timeout_s + IMPORTS_S

    def _dispatch(self) -> None:
        ready = [w for w in self._workers if w.ready]
        for worker in ready:
            if self._asks.waiting and not worker.sent:
                worker.since = time.monotonic()
                self._send(worker, self._asks.waiting.popleft())
        for worker in ready:
            if len(worker.sent) == 1 and self._can_send_ahead(worker):
                self._send(worker, self._asks.waiting.popleft())

    def _can_send_ahead(self, worker: _Worker) -> bool:
        """Whether `worker` may have its next ask before it has answered the last.

        So many must wait that whoever runs dry still finds one, and none may wait behind a long fine-tune.
        """
        waiting = self._asks.waiting
        return len(waiting) >= self.slots and all(t.ask.tier != "tune" for t in (*worker.asks, waiting[0]))

    def _send(self, worker: _Worker, asked: Asked) -> None:
        reference = worker.actor.answer.options(name=f"ask {asked.index}").remote(asked.ask)
        worker.sent.append(_Sent(reference, asked))

    def _start(self) -> None:
        name = f"autoprune-{self._label}-{self._started}"
        self._started += 1
        actor = self._actor.options(name=name, max_restarts=0, max_task_retries=0, **self._demand).remote(name)
        begun = (actor.awake.remote(), actor.build.remote([self._parcel], sys.path))
        self._workers.append(_Worker(actor, name, deque(map(_Sent, begun))))

    def _stop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        ray.kill(worker.actor)


class _Metrics:
    """The progress that the command line shows, as Ray's application metrics, for its dashboard and Prometheus."""

    def __init__(self) -> None:
        tags = ("worker",)
        self._answers = Counter("autoprune_answers", description="Evaluations answered", tag_keys=tags)
        self._busy = Counter("autoprune_busy_seconds", description="Seconds that evaluations took", tag_keys=tags)
        self._retries = Counter("autoprune_retries", description="Asks that had to be tried again", tag_keys=tags)

    def answered(self, worker: str, seconds: float) -> None:
        self._answers.inc(tags={"worker": worker})
        self._busy.inc(max(seconds, 1e-9), tags={"worker": worker})

    def lost(self, worker: str) -> None:
        self._retries.inc(tags={"worker": worker})


class _Actor:
    """The inside of a worker: builds its evaluator once, then answers asks."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._evaluate: Evaluator | None = None

    def __repr__(self) -> str:
        return self._name

    def awake(self) -> tuple[str, str]:
        """("awake", this node's address): there is room for the actor, which may take long in a full cluster."""
        return "awake", ray.util.get_node_ip_address()

    def build(self, parcel: Sequence[Any], paths: Sequence[str]) -> tuple[str, Any]:
        """("ready", this node's address), or ("broken", why). What the driver imports is looked for at its `paths`."""
        sys.path += [path for path in paths if path not in sys.path]
        try:
            self._evaluate = ray.get(parcel[0])()
        except Exception as error:  # the user's code may fail in any way, also while it is imported
            return "broken", broken(_cause(error))
        one_thread()
        return "ready", ray.util.get_node_ip_address()

    def leave(self) -> None:
        """Let go of the evaluator and what it holds on this machine, which a process that is killed cannot."""
        self._evaluate = None
        gc.collect()

    def answer(self, ask: Ask) -> tuple[str, Evaluation]:
        """("done" or "raised", the evaluation)."""
        assert self._evaluate is not None
        return answer(self._evaluate, ask)


def _cause(error: Exception) -> Exception:
    """What went wrong while a parcel was opened, out of Ray's wrapping."""
    cause = getattr(error, "client_exc", error)
    if not isinstance(cause, ImportError | AttributeError):
        return cause if isinstance(cause, Exception) else error
    return InputError(
        f"a worker cannot import the task's code: {one_line(cause)}; executor.runtime_env brings it there, as in "
        f"runtime_env: {{working_dir: .}} or {{py_modules: [mypackage]}}"
    )


def _state(worker: _Worker) -> Literal["starting", "idle", "busy"]:
    if not worker.ready:
        return "starting"
    return "busy" if worker.sent else "idle"


def _death(error: RayActorError) -> str:
    """What Ray says of a death, without its table of ids."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines[1:] if line and ": " not in line[:30]] or lines[:1]
    return " ".join(" ".join(said).split())[:200]
