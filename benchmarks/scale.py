"""The level database of large models: time, memory and bytes, by the width of one layer and for whole networks.

usage: OMP_NUM_THREADS=1 python -m benchmarks.scale [--widths 128,256,512,1024] [--models resnet18,...] [--size 224]

Weights and images are random: they do for time and memory. A layer is a 3x3 convolution of as many outputs as inputs
behind another one; a model is one of timm's. "Building, GB" is what the process held more at its peak; a stitch is one
of 20 random candidates whose entries are made; "refit" is one evaluation of that tier on 256 calibration images (64
repair, 128 score) over the bare forward passes of the same repaired model over the same images, in float32, the mean of
two candidates. Every row comes from a process of its own, in processor seconds of one thread; what is kept in
benchmarks/results/scale.json is not measured again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune import task as task_of
from autoprune.criteria.obs import Obs
from autoprune.database.batches import StatisticsOnly
from autoprune.database.drawn import Drawn
from autoprune.database.on_disk import build_file
from autoprune.database.stitch import Stitcher
from autoprune.database.store import LevelDatabase
from autoprune.evaluation import Ask
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.families import analyze
from autoprune.policy import Policy
from autoprune.protocols import Task
from autoprune.space import Space, restrict
from autoprune.structure import Structure

RESULTS = Path(__file__).resolve().parent / "results" / "scale.json"
SAMPLES, CANDIDATES, BATCH = 64, 20, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", default="128,256,512,1024", help="of one layer")
    parser.add_argument("--models", default="", help="names that timm knows")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args.one, args.size)))
        return
    rows = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {}
    for what in (*filter(None, args.widths.split(",")), *filter(None, args.models.split(","))):
        if what not in rows:
            rows[what] = alone(what, args.size)
            args.results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show(rows)


def alone(what: str, size: int) -> dict[str, Any]:
    """Measure in a process of its own, whose peak memory is then its own too."""
    command = [sys.executable, "-m", "benchmarks.scale", "--one", what, "--size", str(size)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        return {"failed": run.stderr.strip().splitlines()[-1]}
    row: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return {**row, "load": round(os.getloadavg()[0], 1)}


def measured(what: str, size: int) -> dict[str, Any]:
    """One row; seconds are processor seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = what.isdigit()
    model = layer_of(int(what)) if layer else timm_model(what)
    x = torch.randn(SAMPLES, 8, 8, 8) if layer else torch.randn(SAMPLES, 3, size, size)
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    base = peak()
    (structure, row["analysis_s"]) = timed(lambda: restrict(widths_of(analyze(model, (x[:2],))), Space()))
    task = task_over(model, x)
    seen = StatisticsOnly(task, Drawn(tuple(task.split("train"))[:1]), BATCH)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "levels.safetensors"
        (_, row["build_s"]) = timed(lambda: build_file(path, model, structure, seen, Obs()))
        row["build_gb"], row["bytes"] = round(peak() - base, 3), path.stat().st_size
        entries, row["entries_s"] = timed(lambda: stitched(model, structure, LevelDatabase.open(path)))
        row["stitch_s"] = round(entries, 4)
        row["peak_gb"] = round(peak(), 2)
        if not layer:
            row["refit_over_forward"] = refit_over_forward(task, structure, LevelDatabase.open(path))
    return {**row, "groups": len(structure), "widths": sum(len(g.grid) for g in structure)}


def layer_of(width: int) -> nn.Module:
    """The group between two convolutions; the second is its one consumer."""
    return nn.Sequential(
        nn.Conv2d(8, width, 1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 8, 1)
    ).eval()


def timm_model(name: str) -> nn.Module:
    """One of timm's, random weights; torchvision's compiled operators are stubbed where they are missing."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    folder = importlib.util.find_spec("torchvision").submodule_search_locations[0]  # type: ignore[union-attr, index]
    text = (Path(folder) / "_meta_registrations.py").read_text(encoding="utf-8")
    for operator in sorted(set(re.findall(r'torchvision::(\w+)|register_meta\("(\w+)"\)', text))):
        with suppress(RuntimeError):  # it is there
            library.define(f"{max(operator)}(Tensor a) -> Tensor")
    timm = importlib.import_module("timm")
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model.eval()


def task_over(model: nn.Module, x: Tensor) -> Task:
    """The same random images in every split, for nothing is learned from them."""
    batch = (x, torch.zeros(len(x), dtype=torch.long))
    splits = {name: [batch] * 4 for name in ("train", "calibration", "validation", "test")}
    return task_of(model, splits, nn.functional.cross_entropy, lambda outputs, targets: {"accuracy": 0.0})


def refit_over_forward(task: Task, structure: Structure, database: LevelDatabase) -> float:
    """Processor seconds of a `refit` evaluation over those of plain forward passes over what it looks at."""
    settings = Settings(loss="kl", calibration=4 * SAMPLES, validation=BATCH, batch_size=BATCH, precision="fp32")
    evaluator, rng, ratios = TieredEvaluator(task, structure, database, settings), np.random.default_rng(1), []
    looked = [b for part in ("statistics", "fitness") for b in getattr(evaluator.parts, part).cut_to(BATCH)]
    for _ in range(2):
        ask = Ask(Policy.of({g.name: int(rng.choice(g.grid)) for g in structure}), "refit")
        evaluator(replace(ask, tier="stitch"))  # its entries are made
        _, refit = timed(lambda ask=ask: evaluator(ask))
        with torch.no_grad():
            _, forward = timed(lambda: [task.outputs(evaluator.stitcher.model, batch) for batch in looked])
        ratios.append(refit / forward)
    return round(float(np.mean(ratios)), 2)


def stitched(model: nn.Module, structure: Structure, database: LevelDatabase) -> float:
    """Random candidates twice: the first time their entries are made; seconds of one in the second round."""
    rng, stitcher = np.random.default_rng(0), Stitcher(model, structure, database)
    policies = [Policy.of({g.name: int(rng.choice(g.grid)) for g in structure}) for _ in range(CANDIDATES)]
    for policy in policies:
        stitcher.stitch(policy)
    started = time.process_time()
    for policy in policies:
        stitcher.stitch(policy)
    return (time.process_time() - started) / CANDIDATES


def widths_of(structure: Structure) -> Structure:
    """Without its blocks, which the level database holds nothing of."""
    return replace(structure, groups=tuple(g for g in structure.groups if g.kind != "block"))


def timed(action: Any) -> tuple[Any, float]:
    started = time.process_time()
    value = action()
    return value, round(time.process_time() - started, 2)


def peak() -> float:
    """GB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Tables of what there is, and how time and memory grow with a layer's width."""
    print("| what | parameters, M | analysis, s | build, s | building, GB | database, MB | stitch, ms | refit | load |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, r in rows.items():
        if "failed" in r:
            print(f"| {name} | {r['failed']} |")
            continue
        millions, stitch = r["parameters"] / 1e6, 1e3 * r["stitch_s"]
        refit = r.get("refit_over_forward", "")
        seconds = f"{r['analysis_s']:.1f} | {r['build_s']:.1f}"
        sizes = f"{r['build_gb']:.2f} | {r['bytes'] / 1e6:.0f}"
        print(f"| {name} | {millions:.1f} | {seconds} | {sizes} | {stitch:.1f} | {refit} | {r['load']} |")
    widths = [(int(n), r) for n, r in rows.items() if n.isdigit() and "failed" not in r and int(n) <= 1024]
    if len(widths) > 1:
        for key in ("build_s", "build_gb"):
            print(f"{key} grows with the width to the power {exponent([(n, r[key]) for n, r in widths]):.2f}")


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """Of a power law through the points, by least squares of the logarithms."""
    return float(np.polyfit([math.log(n) for n, _ in points], [math.log(max(v, 1e-3)) for _, v in points], 1)[0])


if __name__ == "__main__":
    main()
