"""Actors on a Ray cluster, one for each slot; lost or hung ones are replaced and their asks tried again."""

from __future__ import annotations

import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayError
from ray.util.serialization import deregister_serializer, register_serializer

from autoprune.errors import InputError, RunError, one_line
from autoprune.evaluation import Ask, Evaluation
from autoprune.executors._tasks import Task, Tasks
from autoprune.executors._worker import answer, broken, one_thread
from autoprune.protocols import Evaluator, EvaluatorFactory, WorkerState

CONNECT_S = 5.0
PATIENCE_S = 60.0
"""After so long without any worker the user is told that the cluster has no room."""
_COUNT = count()  # names of actors must differ between the executors of a process
LOGS = "the workers' own messages are in Ray's logs and its dashboard"


@dataclass(eq=False)
class _Worker:
    actor: Any
    name: str
    pending: Any  # the reference of what it is at: its start, or an ask
    node: str = ""
    ready: bool = False
    task: Task | None = None
    since: float = 0.0
    done: int = 0
    busy_s: float = 0.0


class Ray:
    """Long-lived actors, each with its own evaluator; data and models lie once a node in Ray's object store.

    `make_evaluator` goes to the object store with its tensors as plain arrays, which the actors of a node read in
    place; what it refers to must be importable there (`runtime_env`). What travels for an ask is the ask. As many
    actors as `workers` are asked for: those that find no room yet start when a node joins. An ask that takes longer
    than `timeout_s`, whose actor or node is lost, or over which the evaluator raises is tried `retries` times more,
    then it is a failed evaluation.

    `address` is that of a running cluster ("auto", host:port), or "local" for one of this process's own.
    `resources` is what a worker takes: cpu, gpu (fractions too), and custom resources by their name.

    Raises:
        InputError: no cluster at the address, or no node of it that could ever hold a worker.
    """

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
        self._tasks = Tasks(retries)
        self._actor, self._demand = ray.remote(_Actor), _demand(resources)
        self._stillborn = self._started = 0
        self._since, self._label = time.monotonic(), f"{os.getpid()}.{next(_COUNT)}"
        self._parcel = _put(make_evaluator)
        self._workers: dict[Any, _Worker] = {}  # by what they are at; idle ones by their actor
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
            _connect(address or "auto", runtime_env)
        _check_room(resources)

    def submit(self, index: int, ask: Ask) -> None:
        """Send `ask` to an idle actor, or queue it."""
        self._tasks.submit(index, ask)
        self._dispatch()

    def next_done(self, timeout: float | None = None) -> tuple[int, Evaluation] | None:
        """The next result; None after `timeout` seconds, or at once where nothing is under way.

        Raises:
            InputError, RunError: the evaluator could not be built, or the cluster is gone.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while not self._tasks.done:
                if not self._tasks.waiting and all(w.task is None for w in self._workers.values()):
                    return None
                self._turn(deadline)
                if not self._tasks.done and deadline is not None and time.monotonic() >= deadline:
                    return None
        except (RayError, ConnectionError) as error:
            raise RunError(
                f"the Ray cluster is lost: {one_line(error)}; what was finished is kept, and the same command goes on"
            ) from error
        return self._tasks.done.popleft()

    def cancel(self, index: int) -> None:
        """Forget the ask; its result never comes. An actor that is at it is replaced."""
        self._tasks.forget(index)
        for worker in list(self._workers.values()):
            if worker.task is not None and worker.task.index == index:
                self._stop(worker)
                self._start()
        self._dispatch()

    def close(self) -> None:
        """Stop all actors; the connection stays for whoever comes next."""
        self._tasks.clear()
        for worker in list(self._workers.values()):
            self._stop(worker)
        self._parcel = None

    def workers(self) -> tuple[WorkerState, ...]:
        """How each actor is doing, under the name by which Ray's dashboard shows it."""
        return tuple(WorkerState(w.name, _state(w), w.done, w.busy_s, w.node) for w in self._workers.values())

    @property
    def retried(self) -> int:
        """Asks that had to be tried again so far."""
        return self._tasks.retried

    def _turn(self, deadline: float | None) -> None:
        """Wait for an answer, a start, a death or a timeout, and deal with all that have come."""
        ends = [w.since + self._timeout_s for w in self._workers.values() if w.task is not None]
        ends += [deadline] if deadline is not None else []
        ends += [self._since + PATIENCE_S] if not ends else []
        pending = [w.pending for w in self._workers.values() if w.pending is not None]
        patience = max(0.0, min(ends) - time.monotonic())
        heard, rest = ray.wait(pending, num_returns=1, timeout=patience)
        if heard and rest:
            heard += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        for reference in heard:
            self._hear(self._workers[reference])
        for worker in list(self._workers.values()):
            if worker.task is not None and time.monotonic() - worker.since > self._timeout_s:
                self._lose(worker, f"no answer within {self._timeout_s:g} s")
        if not any(w.ready for w in self._workers.values()) and time.monotonic() - self._since > PATIENCE_S:
            self._since = time.monotonic()
            warnings.warn(f"the Ray cluster has had no room for a worker in {PATIENCE_S:g} s; waiting", stacklevel=2)
        self._dispatch()

    def _hear(self, worker: _Worker) -> None:
        try:
            kind, value = ray.get(worker.pending)
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
        del self._workers[worker.pending]
        worker.pending = None
        self._workers[worker.actor] = worker
        if kind == "ready":
            worker.ready, worker.node, self._stillborn = True, value, 0
        elif worker.task is not None:
            task, worker.task = worker.task, None
            worker.done, worker.busy_s = worker.done + 1, worker.busy_s + time.monotonic() - worker.since
            if kind == "raised":
                self._tasks.again(task, value, times=False)
            else:
                self._tasks.finish(task, value)

    def _lose(self, worker: _Worker, reason: str) -> None:
        """Replace a dead or hung actor; its ask goes first in the queue, or fails after the last retry."""
        self._stop(worker)
        if not worker.ready:
            self._stillborn += 1
            if self._stillborn > self._retries + self.slots:
                self.close()
                raise RunError(f"workers die before they are ready: {reason}; {LOGS}")
        if worker.task is not None:
            self._tasks.again(worker.task, Evaluation.failed(worker.task.ask, reason))
        self._start()

    def _dispatch(self) -> None:
        for worker in [w for w in self._workers.values() if w.pending is None]:
            if not self._tasks.waiting:
                return
            worker.task, worker.since = self._tasks.waiting.popleft(), time.monotonic()
            del self._workers[worker.actor]
            worker.pending = worker.actor.answer.options(name=f"ask {worker.task.index}").remote(worker.task.ask)
            self._workers[worker.pending] = worker

    def _start(self) -> None:
        name = f"autoprune-{self._label}-{self._started}"
        self._started += 1
        actor = self._actor.options(name=name, max_restarts=0, max_task_retries=0, **self._demand).remote(name)
        pending = actor.build.remote([self._parcel], sys.path)
        self._workers[pending] = _Worker(actor, name, pending)

    def _stop(self, worker: _Worker) -> None:
        self._workers.pop(worker.actor if worker.pending is None else worker.pending, None)
        ray.kill(worker.actor)


class _Actor:
    """The inside of a worker: builds its evaluator once, then answers asks."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._evaluate: Evaluator | None = None

    def __repr__(self) -> str:
        return f"autoprune {self._name}"

    def build(self, parcel: Sequence[Any], paths: Sequence[str]) -> tuple[str, Any]:
        """("ready", this node's address), or ("broken", why). What the driver imports is looked for at its `paths`."""
        sys.path += [path for path in paths if path not in sys.path]
        try:
            self._evaluate = ray.get(parcel[0])()
        except Exception as error:  # the user's code may fail in any way, also while it is imported
            return "broken", broken(_cause(error))
        one_thread()
        return "ready", ray.util.get_node_ip_address()

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
    return "idle" if worker.task is None else "busy"


def _death(error: RayActorError) -> str:
    """What Ray says of a death, without its table of ids."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines[1:] if line and ": " not in line[:30]] or lines[:1]
    return " ".join(" ".join(said).split())[:200]


def _connect(address: str, runtime_env: Mapping[str, Any] | None) -> None:
    """Join the cluster at `address`; Ray's own waiting for one that is not there takes minutes."""
    if address.startswith("ray://"):
        raise InputError(
            f"executor.address: {address} is for Ray Client, which cannot share data with workers; submit the search "
            f"with `ray job submit -- autoprune search JOB.yaml --ray auto`, or name the head's own host:port"
        )
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options["include_dashboard"] = False
    elif address != "auto":
        _check_listening(address)
    if runtime_env:
        options["runtime_env"] = dict(runtime_env)
    try:
        ray.init(address, **options)
    except (RuntimeError, ValueError, TypeError, OSError, RayError) as error:
        raise InputError(
            f"executor: cannot join a Ray cluster at {address!r}: {one_line(error)}; start one with `ray start "
            f"--head`, name its host:port, or use --ray local for this machine alone"
        ) from error


def _check_listening(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"executor.address must be auto, local or host:port, not {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise InputError(
            f"executor: no Ray cluster answers at {address} ({error.strerror or error}); start one with `ray start "
            f"--head`, see its address with `ray status`, or use --ray auto on a machine of the cluster"
        ) from None


def _demand(resources: Mapping[str, float] | None) -> dict[str, Any]:
    """Ray's options for what a worker takes: one core unless the job says otherwise."""
    custom = {"cpu": 1.0, **(resources or {})}
    return {"num_cpus": custom.pop("cpu"), "num_gpus": custom.pop("gpu", 0.0), "resources": custom or None}


def _check_room(resources: Mapping[str, float] | None) -> None:
    """InputError unless one node, or one that the cluster's autoscaler may add, could hold a worker."""
    wanted = {{"cpu": "CPU", "gpu": "GPU"}.get(n, n): v for n, v in {"cpu": 1.0, **(resources or {})}.items()}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(name, 0.0) >= value for name, value in wanted.items()) for node in nodes):
        return
    growing = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    if growing and all(growing.get(name, 0.0) >= value for name, value in wanted.items()):
        return
    most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in wanted}
    asked = ", ".join(f"{name} {value:g}" for name, value in wanted.items())
    offered = ", ".join(f"{name} {value:g}" for name, value in most.items())
    raise InputError(
        f"executor.resources: a worker takes {asked}, which no node of the cluster can ever offer; the most on one of "
        f"its {len(nodes)} node{'s' * (len(nodes) != 1)} is {offered}; ask for less or start a larger node first"
    )


def _put(make_evaluator: EvaluatorFactory) -> Any:
    """The factory in the object store."""
    try:
        with _tensors_as_arrays():
            return ray.put(make_evaluator)
    except RayError as error:
        raise RunError(f"executor: no room for the data in Ray's object store: {one_line(error)}") from error
    except Exception as error:  # whatever pickling runs into
        raise InputError(f"executor: the evaluator's factory cannot be sent to workers: {one_line(error)}") from error


@contextmanager
def _tensors_as_arrays() -> Iterator[None]:
    """Pickle dense CPU tensors as numpy arrays, which Ray's workers map instead of copying."""
    register_serializer(torch.Tensor, serializer=_to_array, deserializer=_from_array)
    try:
        yield
    finally:
        deregister_serializer(torch.Tensor)


def _to_array(tensor: torch.Tensor) -> tuple[np.ndarray, torch.dtype, list[int], list[int]]:
    """Its bytes in storage order (numpy would make channels_last contiguous), its type, that order and its sizes."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))
    stored = tensor.detach().cpu().permute(order).contiguous()
    return stored.flatten().view(torch.uint8).numpy(), stored.dtype, order, list(stored.shape)


def _from_array(value: tuple[np.ndarray, torch.dtype, list[int], list[int]]) -> torch.Tensor:
    """A tensor over the array's memory, which is shared and must not be written to."""
    array, dtype, order, shape = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is read-only
        stored = torch.from_numpy(array).view(dtype).view(shape)
    return stored.permute(np.argsort(order).tolist())
