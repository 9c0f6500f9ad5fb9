"""Whole searches of large models on one machine: how long, how much memory each process held, and what came out.

usage: OMP_NUM_THREADS=1 python -m benchmarks.large resnet50 | vgg11 [--out DIR] [--show]

resnet50: 20 trials at 224 pixels on 256 calibration images, two workers, random weights and generated images (they do
for time and memory; the front means nothing). vgg11: 9.2 M parameters, trained here on JPEG copies of CIFAR-10 (see
benchmarks/vgg11.py), 60 trials, and the control arms at the same budgets on all 10 000 test images. Memory is looked at
four times a second: `peak` is what was resident at once over all processes (pages that they share count once each),
`own` what no other process holds. What is kept in results/large.json is not measured again; a search that was cut
off goes on in --out, and its seconds are added up.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from autoprune.files.whole import write_whole
from benchmarks.scale import timm_model

RESULTS = Path(__file__).resolve().parent / "results" / "large.json"
JPEG = Path(__file__).resolve().parents[2] / "shared" / "data"
LOOK_S = 0.25
GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=sorted(JOBS))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-large"))
    parser.add_argument("--show", action="store_true", help="what there is")
    args = parser.parse_args()
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if not args.show and args.what not in kept:
        kept[args.what] = searched(args.what, args.out / args.what)
        write_whole(RESULTS, json.dumps(kept, indent=1) + "\n")
    print(json.dumps(kept[args.what], indent=1))


def searched(what: str, out: Path) -> dict[str, Any]:
    """Run the command in a process of its own and watch its memory and that of its workers."""
    out.mkdir(parents=True, exist_ok=True)
    job, took = out / "job.yaml", out / "took.json"
    job.write_text(yaml.safe_dump(JOBS[what](out)), encoding="utf-8")
    command = [sys.executable, "-m", "autoprune.cli", "search", str(job), "--out", str(out / "run"), "--json"]
    before = json.loads(took.read_text(encoding="utf-8")) if took.exists() else {"seconds": 0.0, "calls": 0}
    with (out / "stdout").open("w+", encoding="utf-8") as stdout, (out / "stderr").open("a", encoding="utf-8") as log:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=stdout, stderr=log)
        memory = watched(process, lambda: _note(took, before, time.monotonic() - started))
        if process.returncode:
            raise SystemExit(f"{what}: the search ended with {process.returncode}; see {out / 'stderr'}")
        stdout.seek(0)
        result = json.loads(stdout.read())
    load = round(os.getloadavg()[0], 1)
    times = json.loads(took.read_text(encoding="utf-8"))
    return {**times, "load": load, "memory_gb": memory, "spent": result["spent"], "summary": result["summary"]}


def _note(took: Path, before: Mapping[str, Any], seconds: float) -> None:
    write_whole(took, json.dumps({"seconds": round(before["seconds"] + seconds), "calls": before["calls"] + 1}))


def watched(process: subprocess.Popen[Any], every: Any) -> dict[str, Any]:
    """GB: of the driver, of each worker by age, and of all at once, until the process ends."""
    most: dict[int, float] = {}
    own: dict[int, float] = {}
    at_once = 0.0
    while process.poll() is None:
        held = {pid: memory_of(pid) for pid in [process.pid, *children(process.pid)]}
        for pid, (resident, private) in held.items():
            most[pid], own[pid] = max(most.get(pid, 0.0), resident), max(own.get(pid, 0.0), private)
        at_once = max(at_once, sum(private for _, private in held.values()) + shared_of(held))
        every()
        time.sleep(LOOK_S)
    workers = sorted(set(most) - {process.pid})
    return {
        "driver": {"peak": round(most[process.pid], 2), "own": round(own[process.pid], 2)},
        "workers": [{"peak": round(most[pid], 2), "own": round(own[pid], 2)} for pid in workers],
        "at_once": round(at_once, 2),
    }


def shared_of(held: Mapping[int, tuple[float, float]]) -> float:
    """What processes share lies in memory once: the most that any of them has of it."""
    return max((resident - private for resident, private in held.values()), default=0.0)


def memory_of(pid: int) -> tuple[float, float]:
    """GB that a process has resident, and what of it is its own."""
    figures: dict[str, int] = {}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]:
            name, _, value = line.partition(":")
            figures[name] = int(value.split()[0]) * 1024
    own = figures.get("Private_Clean", 0) + figures.get("Private_Dirty", 0)
    return figures.get("Rss", 0) / GB, own / GB


def children(pid: int) -> list[int]:
    """Processes that this one started."""
    with suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    return []


def resnet50() -> nn.Module:
    """Random weights."""
    return timm_model("resnet50")


def resnet50_job(out: Path) -> dict[str, Any]:
    """256 images repair and score, 64 validate."""
    arrays, weights = generated(out, {"train": 400, "test": 64}, 224), str((out / "weights.safetensors").resolve())
    torch.manual_seed(0)
    save_file(resnet50().state_dict(), weights)
    model = {"model": "benchmarks.large:resnet50", "weights": weights}
    return {
        "task": {"name": "images", "args": {**model, **arrays, **UNIT, "n_calibration": 256, "n_validation": 64}},
        "space": {"granularity": "channel", "multiple_of": "auto", "max_sparsity": 0.9},
        "budget": {"macs": [0.3, 0.9], "at": [0.7, 0.5, 0.3]},
        "search": {"sampler": "evolution", "trials": 20, "seed": 0},
        "evaluator": {
            **{"calibration": 256, "validation": 64, "fitness": "refit", "finalists": 0, "finetune_steps": 0},
        },
        "executor": {"kind": "local", "workers": 2, "timeout_s": 3600},
    }


UNIT = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def generated(out: Path, counts: Mapping[str, int], size: int) -> dict[str, str]:
    """Random pictures and class numbers as the task `images` reads them."""
    rng, paths = np.random.default_rng(0), {}
    for name, n in counts.items():
        for kind, array in (
            ("images", rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)),
            ("labels", rng.integers(0, 1000, n)),
        ):
            paths[f"{name}_{kind}"] = str((out / f"{name}_{kind}.npy").resolve())
            np.save(paths[f"{name}_{kind}"], array)
    return paths


def vgg11_job(out: Path) -> dict[str, Any]:
    """The trained network; 1 024 images repair and score."""
    from benchmarks.vgg11 import HELD_BACK, STATISTICS, WEIGHTS

    arrays = {
        f"{s}_{k}": str(JPEG / f"cifar10_jpeg_{s}_{k}.npy") for s in ("train", "test") for k in ("images", "labels")
    }
    weights = {"model": "benchmarks.vgg11:vgg11", "weights": str(WEIGHTS.resolve())}
    return {
        "task": {"name": "images", "args": {**weights, **arrays, **STATISTICS, **HELD_BACK}},
        "space": {"granularity": "channel", "multiple_of": "auto", "max_sparsity": 0.95},
        "budget": {"macs": [0.2, 0.9], "at": [0.7, 0.5, 0.3]},
        "search": {"sampler": "evolution", "trials": 60, "seed": 0},
        "evaluator": {
            "calibration": 1024,
            "validation": 1024,
            "fitness": "refit",
            "finalists": 3,
            "finetune_steps": 60,
        },
        "executor": {"kind": "local", "workers": 2},
    }


JOBS = {"resnet50": resnet50_job, "vgg11": vgg11_job}


if __name__ == "__main__":
    main()
