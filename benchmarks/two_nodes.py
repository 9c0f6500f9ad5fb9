"""A VGG-11 (9.2 M parameters) searched on a Ray cluster of two nodes on this machine, and by this machine alone.

usage: OMP_NUM_THREADS=1 python -m benchmarks.two_nodes [--trials 8] [--out DIR]

Its weights are those of `python -m benchmarks.vgg11`, of which one epoch (`--epochs 1`) is enough here.

Is the front that of this machine alone, also where a node dies in the drop pass? What goes to a node, and how often is
an entry of the level database made on it? The nodes have a core and a folder for temporary files each. Figures go into
results/two_nodes.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

import autoprune
from autoprune.files.job import Job
from autoprune.files.whole import write_whole
from benchmarks.large import vgg11_job
from tests.ray_clusters import start_cluster, stop_cluster

RESULTS = Path(__file__).resolve().parent / "results" / "two_nodes.json"
LOOK_S = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-two-nodes"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    alone = searched(args, "alone", {"kind": "local", "workers": 2})
    found = {"alone": alone[1]}
    for name, lost in (("two nodes", False), ("a node lost", True)):
        front, facts = on_cluster(args, name, lost)
        found[name] = {**facts, "front": difference(alone[0], front)}
        print(name, found[name], flush=True)
        write_whole(RESULTS, json.dumps(found, indent=1) + "\n")


def searched(args: argparse.Namespace, name: str, executor: Mapping[str, Any]) -> tuple[Any, Any]:
    """The front of a fresh search, and its seconds."""
    job = vgg11_job(args.out)
    job["search"]["trials"] = args.trials
    job["evaluator"] |= {"calibration": 256, "validation": 256, "finalists": 0, "finetune_steps": 0}
    folder = args.out / name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    run = autoprune.search(Job.from_dict({**job, "executor": dict(executor)}), out=folder)
    return run.front, {"seconds": round(time.monotonic() - started, 1), "load": round(os.getloadavg()[0], 1)}


def on_cluster(args: argparse.Namespace, name: str, lost: bool) -> tuple[Any, Any]:
    """The front of a search on two nodes, and what was seen there; `lost`: one dies when factors begin to come in."""
    cluster, _ = start_cluster()
    places = [args.out.resolve() / f"node-{i}" for i in (0, 1)]
    for place in places:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    nodes = [cluster.add_node(num_cpus=1, resources={"slot": 1.0}, env_vars={"TMPDIR": str(p)}) for p in places]
    ray.init(cluster.address, log_to_driver=False, logging_level="error")
    watch = Watch(args.out / name.replace(" ", "-"), places, lambda: cluster.remove_node(nodes[1]) if lost else None)
    try:
        executor = {"kind": "ray", "address": cluster.address, "workers": 2, "resources": {"cpu": 1, "slot": 1}}
        front, facts = searched(args, name, executor)
    finally:
        watch.stop()
        stop_cluster(cluster)
    return front, {**facts, **watch.facts()}


class Watch(threading.Thread):
    """Looks at the entries on both nodes and at the largest objects in the store; calls `strike` in the drop pass."""

    def __init__(self, folder: Path, places: list[Path], strike: Any) -> None:
        super().__init__(daemon=True)
        self._folder, self._places, self._strike = folder, places, strike
        self._seen: dict[str, set[tuple[str, int]]] = {p.name: set() for p in places}
        self._struck, self._ended, self._stored = 0, threading.Event(), 0
        self.start()

    def run(self) -> None:
        while not self._ended.wait(LOOK_S):
            for place in self._places:
                for path in place.glob("autoprune-shared-*/*"):
                    if path.suffix == ".safetensors":
                        self._seen[place.name].add((path.name, path.stat().st_ino))
            parts = len(list((self._folder / "database").rglob("*.safetensors")))
            if parts and not self._struck:
                self._struck = parts
                self._strike()

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def facts(self) -> dict[str, Any]:
        """Entries by node, how many of them came a second time, and files of the database when a node was lost."""
        made = {name: len(seen) for name, seen in self._seen.items()}
        names = {name: len({file for file, _ in seen}) for name, seen in self._seen.items()}
        return {"entries": made, "different": names, "struck_at": self._struck}


def difference(one: Any, other: Any) -> dict[str, Any]:
    """Whether two fronts have the same policies, and how far their losses are apart at most."""
    a, b = ({tuple(p.policy.widths): p.loss() for p in front} for front in (one, other))
    return {
        "same policies": a.keys() == b.keys(),
        "points": len(a),
        "largest difference of losses": max((abs(a[k] - b[k]) for k in a.keys() & b.keys()), default=None),
    }


if __name__ == "__main__":
    main()
