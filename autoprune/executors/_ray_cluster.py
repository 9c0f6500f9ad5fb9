"""Joining a Ray cluster, room for workers on it, and data in its object store that workers map instead of copying."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray._private import services
from ray.exceptions import RayError, RayTaskError
from ray.util.serialization import deregister_serializer, register_serializer

from autoprune.errors import InputError, RunError, one_line

if TYPE_CHECKING:
    import torch

CONNECT_S = 5.0
RETRIES = 3
"""How often an item is tried again whose node is lost."""
AHEAD = 2
"""Items that wait in the object store."""


def connect(address: str, runtime_env: Mapping[str, Any] | None = None, cores: int | None = None) -> None:
    """Join the cluster at `address`, or start one of `cores` for this process at "local".

    Ray's own waiting for a cluster that is not there takes minutes, so the door is tried first.

    Raises:
        InputError: there is none, or it cannot take the runtime_env, in one line that says what to try.
    """
    where = _where(address)
    if where.startswith("ray://"):
        raise InputError(
            f"executor.address (or RAY_ADDRESS): {where} is for Ray Client, which cannot share data with workers; "
            f"submit the search with `ray job submit -- autoprune search JOB.yaml --ray auto`, or name the head's own "
            f"host:port"
        )
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    if where == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {"include_dashboard": False, "num_cpus": cores}
    elif where != "auto":
        _check_listening(where)
    if runtime_env:
        options["runtime_env"] = dict(runtime_env)
    try:
        ray.init(address, **options)
    except (RuntimeError, ValueError, TypeError, OSError, RayError) as error:
        if runtime_env and isinstance(error, ValueError | TypeError):
            raise InputError(f"executor.runtime_env cannot be used: {one_line(error)}") from error
        raise InputError(
            f"executor: cannot join a Ray cluster at {address!r}: {one_line(error)}; start one with `ray start "
            f"--head`, name its host:port, or use --ray local for this machine alone"
        ) from error


def _where(address: str) -> str:
    """What "auto" stands for: $RAY_ADDRESS, or the cluster that `ray start` left word of, which may be long dead."""
    if address != "auto":
        return address
    try:
        return services.canonicalize_bootstrap_address(address) or "local"
    except (OSError, ValueError):
        return os.environ.get("RAY_ADDRESS") or address  # of which the caller, or ray.init at once, says what is wrong


def _check_listening(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"executor.address (or RAY_ADDRESS) must be auto, local or host:port, not {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise InputError(
            f"executor: no Ray cluster answers at {address} ({error.strerror or error}); start one with `ray start "
            f"--head` (after `ray stop` where one has died), see its address with `ray status`, or use --ray auto on a "
            f"machine of the cluster"
        ) from None


def demand(resources: Mapping[str, float] | None) -> dict[str, Any]:
    """Ray's options for what a worker takes: one core unless the job says otherwise."""
    custom = {"cpu": 1.0, **(resources or {})}
    return {"num_cpus": custom.pop("cpu"), "num_gpus": custom.pop("gpu", 0.0), "resources": custom or None}


def _wanted(resources: Mapping[str, float] | None) -> dict[str, float]:
    """The same by the names that Ray's nodes have for them."""
    return {{"cpu": "CPU", "gpu": "GPU"}.get(n, n): v for n, v in {"cpu": 1.0, **(resources or {})}.items()}


def check_room(resources: Mapping[str, float] | None) -> None:
    """InputError unless one node, or one that the cluster's autoscaler may add, could hold a worker."""
    wanted = _wanted(resources)
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


def spread(
    function: Callable[[Any], Any], items: Iterable[tuple[int, Any]], resources: Mapping[str, float] | None
) -> Iterator[tuple[int, Any]]:
    """(number, what `function` gives) for all items, as they come; those of a node that is lost are tried again.

    No more of them lie in the object store than the cluster can work on, and a few for what joins it.
    """
    remote = ray.remote(_apply).options(max_retries=RETRIES, **demand(resources))
    work, todo, under_way = put(function), iter(items), dict[Any, int]()
    try:
        while True:
            for number, item in islice(todo, max(0, _room(resources) + AHEAD - len(under_way))):
                under_way[remote.remote([work, put(item)], sys.path)] = number
            if not under_way:
                return
            (reference, *_), _ = ray.wait(list(under_way), num_returns=1)
            yield under_way.pop(reference), ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from None
        raise RunError(f"a worker of the Ray cluster failed: {one_line(error.cause)}") from error
    except (RayError, ConnectionError) as error:
        raise RunError(f"the Ray cluster is lost: {one_line(error)}; the same command goes on") from error
    finally:
        for reference in under_way:
            ray.cancel(reference, force=True)


def _apply(parcels: Sequence[Any], path: Sequence[str]) -> Any:
    """What the first parcel gives for the second; they are opened where everything can be imported."""
    sys.path[:] = path
    function, item = ray.get(list(parcels))
    return function(item)


def _room(resources: Mapping[str, float] | None) -> int:
    """Workers that the cluster has room for as it is."""
    wanted = _wanted(resources)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min((int(n.get(name, 0.0) / v) for name, v in wanted.items() if v > 0), default=1) for n in nodes)


def put(value: Any) -> Any:
    """A value, such as an evaluator's factory, in the object store."""
    try:
        with _tensors_as_arrays():
            return ray.put(value)
    except RayError as error:
        raise RunError(f"executor: no room for the data in Ray's object store: {one_line(error)}") from error
    except Exception as error:  # whatever pickling runs into
        raise InputError(f"executor: what workers need cannot be sent: {one_line(error)}") from error


@contextmanager
def _tensors_as_arrays() -> Iterator[None]:
    """Pickle tensors as numpy arrays, which Ray's workers map instead of copying."""
    import torch  # here and below: a worker whose evaluator needs no torch starts in a second

    register_serializer(torch.Tensor, serializer=_to_array, deserializer=_from_array)
    try:
        yield
    finally:
        deregister_serializer(torch.Tensor)


def _to_array(tensor: torch.Tensor) -> tuple[np.ndarray, torch.dtype, list[int], list[int]]:
    """Its bytes in storage order (numpy would make channels_last contiguous), its type, that order and its sizes."""
    import torch

    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))
    stored = tensor.detach().cpu().permute(order).contiguous()
    return stored.flatten().view(torch.uint8).numpy(), stored.dtype, order, list(stored.shape)


def _from_array(value: tuple[np.ndarray, torch.dtype, list[int], list[int]]) -> torch.Tensor:
    """A tensor over the array's memory, which is shared and must not be written to."""
    import torch

    array, dtype, order, shape = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is read-only
        stored = torch.from_numpy(array).view(dtype).view(shape)
    return stored.permute(np.argsort(order).tolist())
