"""Ray clusters of several real nodes on one machine, and what the tests evaluate on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.exceptions import OutOfMemoryError

from autoprune.evaluation import Ask, Evaluation
from autoprune.structure import Structure
from tests.synthetic import Hills

try:
    from ray._common.utils import reset_ray_address
except ImportError:  # where Ray had it before
    from ray._private.utils import reset_ray_address

SLOT = {"slot": 1.0}
"""A custom resource that worker nodes alone offer, so that nothing runs on the head, which the tests never kill."""


def start_cluster(*nodes: int) -> tuple[Cluster, list[Any]]:
    """A head without room for workers, and a node for each number of slots."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    reset_ray_address()  # that others on this machine find: killed tests would leave them that of a dead cluster
    return cluster, [add_node(cluster, slots) for slots in nodes]


def add_node(cluster: Cluster, slots: int) -> Any:
    """One more raylet with `slots` slots."""
    return cluster.add_node(num_cpus=slots, resources={"slot": float(slots)})


def stop_cluster(cluster: Cluster) -> None:
    """Leave it and end all of its processes."""
    ray.shutdown()
    cluster.shutdown()


@dataclass(frozen=True)
class OnNode:
    """A factory of `Hills` that also tell on which node they ran, in the metric "node"."""

    structure: Structure
    seconds: float = 0.0

    def __call__(self) -> Callable[[Ask], Evaluation]:
        return self.evaluate

    def evaluate(self, ask: Ask) -> Evaluation:
        node = int(ray.get_runtime_context().get_node_id()[:12], 16)
        found = Hills(self.structure, self.seconds)(ask)
        return Evaluation(ask, found.loss, found.costs, {"node": node}, found.passes, found.seconds)


def node_number(node: Any) -> int:
    """What OnNode tells of a node of the cluster."""
    return int(node.node_id[:12], 16)


@dataclass(frozen=True)
class NoRoom:
    """A factory of `Hills` whose first answer is what Ray says of a worker that its memory monitor has ended."""

    structure: Structure
    told: Path

    def __call__(self) -> Callable[[Ask], Any]:
        return self.evaluate

    def evaluate(self, ask: Ask) -> Any:
        if self.told.exists():
            return Hills(self.structure)(ask)
        self.told.touch()
        return _Ended()


class _Ended:
    def __reduce__(self) -> Any:
        raise OutOfMemoryError("Task was killed due to the node running low on memory.")


@dataclass(frozen=True)
class Shared:
    """Tells where the memory of a tensor lies, whether it is as it was sent, and how large the process is."""

    tensors: tuple[Any, ...]

    def __call__(self) -> Callable[[Ask], Evaluation]:
        return self.evaluate

    def evaluate(self, ask: Ask) -> Evaluation:
        sums = {f"sum{i}": float(t.double().sum()) for i, t in enumerate(self.tensors)}
        strides = {f"stride{i}": float(t.stride(1)) for i, t in enumerate(self.tensors) if t.dim() == 4}
        mapped = {f"mapped{i}": float(is_shared_memory(t.data_ptr())) for i, t in enumerate(self.tensors)}
        return Evaluation(ask, 1.0, metrics={**sums, **strides, **mapped})


def is_shared_memory(address: int) -> bool:
    """Whether an address of this process lies in a mapping of Ray's object store."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= address < high:
            return "plasma" in line or "/dev/shm" in line
    return False
