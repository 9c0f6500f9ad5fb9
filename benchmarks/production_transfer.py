"""A policy of ResNet-20 carried over to a ResNet-32, beside a search of the ResNet-32's own, on 10 000 test images.

usage: OMP_NUM_THREADS=1 python -m benchmarks.production_transfer [--out DIR] [--policy POLICY.json] [--show]
       [--budgets 0.7,0.5,0.3] [--epochs 35] [--trials 300] [--steps 300] [--workers 2] [--results FILE]

The ResNet-32 is trained here on the JPEG copies of CIFAR-10 (15 904 images, the others are held back for calibration
and validation; SGD, a one-cycle rate, bfloat16; about 40 minutes on one core), then searched as benchmarks/search.py
searches the ResNet-20: `layer*.conv1`, evolution, the same images. The points of the ResNet-20 are those of evolution,
seed 0, in results/search, or of a policy file. At each budget the point carried over, the uniform policy and the best
of the search are repaired and scored on test, and scored again after --steps of training.

Every figure is kept in --results as it comes, and is not measured again; training and search go on in --out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from autoprune import plugins
from autoprune.application.transfer import carried, sibling_of
from autoprune.costs import build_cost
from autoprune.errors import InputError
from autoprune.evaluation import Ask
from autoprune.executors._lazy import Lazy
from autoprune.executors.local import Local
from autoprune.families import analyze
from autoprune.files.job import Job
from autoprune.files.policy_file import load_front
from autoprune.files.whole import write_whole
from autoprune.front import Base, Point
from autoprune.policy import Policy
from autoprune.protocols import Task
from autoprune.run.prepare import prepare
from autoprune.run.run import Run
from autoprune.run.setting import Setting
from autoprune.space import Space, restrict
from autoprune.structure import Structure
from autoprune.tasks import resnet32
from autoprune.tasks._arrays import cut
from autoprune.tasks.images import Images
from autoprune.tracing.fingerprint import weights_fingerprint
from autoprune.tracing.inputs import described
from autoprune.tracing.slim import named_tensors
from benchmarks.resnet20 import CALIBRATION, DATA, images, on_test
from benchmarks.search import evaluated
from benchmarks.search_results import Store
from benchmarks.vgg11 import BATCH, DECAY, RATE, STATISTICS, normalised, scored, trained

HERE = Path(__file__).resolve().parent
VALIDATION = 1024
WEIGHTS = "resnet32.safetensors"
FOLDER = "AUTOPRUNE_RESNET32"
"""The variable that tells workers where the weights lie."""
TIERS = ("refit", "tune")
ARMS = ("transfer", "uniform", "search")


def main(words: Sequence[str] | None = None) -> None:
    args = parsed(sys.argv[1:] if words is None else words)
    cells = Cells(args.results)
    if not args.show:
        measure(args, cells)
    print(table(cells.held))


def parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-production/transfer"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "production_transfer.json")
    parser.add_argument("--policy", type=Path, help="a front of ResNet-20 in place of the measured one")
    parser.add_argument("--budgets", default="0.7,0.5,0.3")
    parser.add_argument("--epochs", type=int, default=35)
    parser.add_argument("--images", type=int, default=None, help="train on so many alone")
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--calibration", type=int, default=CALIBRATION)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="print what --results holds; measure nothing")
    args = parser.parse_args(words)
    args.budgets = [float(word) for word in args.budgets.split(",")]
    return args


class Cells:
    """What is measured, in one file; a cell that is there stays."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def claim(self, protocol: Mapping[str, Any]) -> None:
        """InputError where the file holds figures of other settings."""
        held = self.held.setdefault("protocol", dict(protocol))
        if other := [f"{k} is {held.get(k)} there, {v} here" for k, v in protocol.items() if held.get(k) != v]:
            raise InputError(f"{self.path} holds other results: {'; '.join(other)}; choose another --results")

    def add(self, name: str, cell: Any) -> None:
        """Keep it."""
        self.held[name] = cell
        write_whole(self.path, json.dumps(self.held, indent=1) + "\n")
        print(f"{name}: {cell}", flush=True)


def measure(args: argparse.Namespace, cells: Cells) -> None:
    """Whatever is not there yet."""
    cells.claim({key: getattr(args, key) for key in ("epochs", "images", "trials", "steps", "calibration")})
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ[FOLDER] = str(args.out.resolve())
    if "resnet32" not in cells.held:
        cells.add("resnet32", trained_here(args))
    wanted = [f"{name} {tier}" for name in ("dense", *names(args.budgets)) for tier in TIERS]
    if all(name in cells.held for name in wanted):
        return
    run = Run(job(args), args.out / "resnet32").finish()
    cells.add("search", {"spent": dict(run.spent), "points": len(run.front)})
    setting = prepare(job(args), args.out / "resnet32")
    policies, found = {"dense": Policy.dense(setting.structure)}, points(args)
    sibling = sibling_of(found[0].base, task().build(), task().example_inputs(), "ResNet-32")
    for at, point in zip(args.budgets, found, strict=True):
        moved = carried(point, sibling)
        cells.add(f"{at:g} carried over", {k: v for k, v in moved.base.space["transfer"].items() if k != "from"})
        arms = {"transfer": moved.policy, "uniform": plugins.load("strategies", "uniform")(setting.problem, at)}
        arms["search"] = run.front.select(macs=at).policy
        policies |= {f"{at:g} {arm}": policy for arm, policy in arms.items()}
    for tier in TIERS:
        score(args, cells, setting, policies, tier)


def names(budgets: Sequence[float]) -> Iterator[str]:
    """Of what is scored, but for the dense network."""
    return (f"{at:g} {arm}" for at in budgets for arm in ARMS)


def score(args: argparse.Namespace, cells: Cells, setting: Setting, policies: Mapping[str, Policy], tier: Any) -> None:
    """Policies on the test images, each once, whatever arms share it."""
    new = {name: policy for name, policy in policies.items() if f"{name} {tier}" not in cells.held}
    asks = [(policy.digest, Ask(policy, tier, split="validation")) for policy in dict.fromkeys(new.values())]
    part = setting.job.executor
    make = partial(on_test, setting.evaluator_factory())
    workers = Lazy(lambda: Local(make, part.n_workers, part.timeout_s, part.retries))
    for e in evaluated(setting, args.out / "test", asks, executor=workers):
        if not e.ok:
            print(f"{tier} {e.ask.policy.digest}: {e.error}", flush=True)
            continue
        found = {
            "macs": e.costs["macs"],
            "loss": e.loss,
            "accuracy": e.metrics["accuracy"],
            "seconds": round(e.seconds),
        }
        for name in (n for n, policy in new.items() if policy == e.ask.policy):
            cells.add(f"{name} {tier}", found)


def task() -> Task:
    """The ResNet-32 with the weights that were trained here, and the JPEG copies of CIFAR-10."""
    arrays: dict[str, Any] = {
        f"{s}_{k}": DATA / f"cifar10_jpeg_{s}_{k}.npy" for s in ("train", "test") for k in ("images", "labels")
    }
    weights, held = Path(os.environ[FOLDER]) / WEIGHTS, {"n_calibration": CALIBRATION, "n_validation": VALIDATION}
    return Images(model="autoprune.tasks:resnet32", weights=weights, **STATISTICS, **held, **arrays)


def job(args: argparse.Namespace) -> Job:
    """The search of the ResNet-32."""
    return Job.from_dict(
        {
            "task": {"factory": "benchmarks.production_transfer:task"},
            "space": {"granularity": "channel", "include": ["layer*.conv1"]},
            "budget": {"macs": [0.25, 0.9], "at": args.budgets},
            "search": {"sampler": "evolution", "trials": args.trials, "seed": 0},
            "evaluator": {
                **{"calibration": args.calibration, "validation": VALIDATION, "fitness": "refit", "precision": "fp32"},
                **{"finalists": 0, "finetune_steps": args.steps},
            },
            "executor": {"workers": args.workers, "timeout_s": 3600},
        }
    )


def points(args: argparse.Namespace) -> list[Point]:
    """Of the ResNet-20, one a budget: those of a policy file, or those that the search benchmark has found."""
    if args.policy is not None:
        front = load_front(args.policy)
        return [front.select(macs=at) for at in args.budgets]
    arm = Store(HERE / "results" / "search").arm("evolution", 0)
    if arm is None or not {*args.budgets} <= {*arm.policies}:
        raise InputError(f"results/search holds no policies of the ResNet-20 at {args.budgets}; give --policy")
    own = images()
    structure = restrict(analyze(own.build(), own.example_inputs()), Space(("channel",), ("layer*.conv1",)))
    base = base_of(own, structure)
    costs = {name: build_cost(name, structure) for name in base.costs}
    return [found_point(f"{at:g}", arm.policies[at], base, costs) for at in args.budgets]


def base_of(own: Task, structure: Structure) -> Base:
    """The ResNet-20 as a policy file identifies it."""
    model = own.build()
    return Base(
        structure_fingerprint=structure.fingerprint,
        weights_fingerprint=weights_fingerprint(model),
        model="ResNet-20",
        inputs=described(own.example_inputs()),
        costs={name: build_cost(name, structure).dense for name in ("macs", "params")},
        metrics={},
        groups=structure.groups,
        space={"granularity": "channel", "criterion": "obs", "multiple_of": "auto"},
        data="",
        shapes={name: tuple(t.shape) for name, t in named_tensors(model).items()},
    )


def found_point(name: str, policy: Policy, base: Base, costs: Mapping[str, Any]) -> Point:
    """A point of these widths; its losses are not asked for."""
    widths = policy.as_dict()
    array = np.array([widths[g.name] for g in base.groups])
    absolute = {n: float(cost(array)) * base.costs[n] for n, cost in costs.items()}
    keep = {n: tuple(range(w)) for n, w in widths.items()}
    return Point(name, policy, keep, {**absolute, "macs_ratio": absolute["macs"] / base.costs["macs"]}, {}, {}, 0, base)


def trained_here(args: argparse.Namespace) -> dict[str, Any]:
    """Train the ResNet-32, or go on with that; after every epoch its state is kept."""
    torch.manual_seed(0)
    model = resnet32().to(memory_format=torch.channels_last)
    pictures, labels = (np.load(DATA / f"cifar10_jpeg_train_{k}.npy") for k in ("images", "labels"))
    rows = cut(len(pictures), CALIBRATION, VALIDATION, seed=0)["train"][: args.images]
    x, y = normalised(pictures[rows]), torch.from_numpy(labels[rows].astype(np.int64))
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=DECAY, nesterov=True)
    steps = args.epochs * (len(y) // BATCH)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
    parts["schedule"] = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.2)
    kept, first, seconds = args.out / "resnet32.pt", 0, 0.0
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first, seconds = state["epoch"], state["seconds"]
    for epoch in range(first, args.epochs):
        started = time.process_time()
        loss = trained(model, x, y, optimizer, parts["schedule"], torch.Generator().manual_seed(epoch))
        seconds += time.process_time() - started
        draft = kept.with_suffix(".part")
        torch.save({**{k: v.state_dict() for k, v in parts.items()}, "epoch": epoch + 1, "seconds": seconds}, draft)
        draft.replace(kept)
        print(f"epoch {epoch + 1}: loss {loss:.3f}, {seconds:.0f} processor seconds", flush=True)
    accuracy = scored(model.eval())
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, args.out / WEIGHTS)
    return {"images": len(y), "test_accuracy": accuracy, "processor_seconds": round(seconds)}


def table(held: Mapping[str, Any]) -> str:
    """KL to the dense network and accuracy on test, as far as they go."""
    lines = ["| budget | arm | MACs | repaired: KL / accuracy | trained: KL / accuracy |", "|---|---|---|---|---|"]
    budgets = dict.fromkeys(name.split()[0] for name in held if name.split()[-1] in TIERS and name[0].isdigit())
    for name in ("dense", *names([float(at) for at in budgets])):
        cells = [held.get(f"{name} {tier}") for tier in TIERS]
        shown = ["-" if c is None else f"{c['loss']:.4f} / {c['accuracy']:.2%}" for c in cells]
        macs = next((f"{c['macs']:.4f}" for c in cells if c is not None), "-")
        at, _, arm = name.partition(" ")
        lines.append(f"| {' | '.join(['', at, macs] if not arm else [at, arm, macs])} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
