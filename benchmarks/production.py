"""Points of ResNet-20 into production: recoveries beside control arms, FastNAS and Torch-Pruning; and slicing alone.

usage: OMP_NUM_THREADS=1 python -m benchmarks.production [--only recipes,others,slicing] [--arms a,b] [--seeds 3]
       [--out DIR] [--show]

recipes: policies of results/search-again (evolution and the control arms) at 70, 50 and 30 % of the MACs, applied with
`--finetune full`: 5 epochs in all on 15 904 training images, one-shot (three seeds at 50 %, one at 70 and 30 %) and
iterative (at 50 %). others: FastNAS and Torch-Pruning at 50 % (benchmarks/others.py), their norms recalibrated, then
300 steps and 5 epochs of the very same course. Accuracy and KL are of the 10 000 test images of the JPEG set, latency
is onnxruntime's over the dense model's, one thread, batch 1. slicing: a ResNet-50 (timm's, random weights and widths)
cut by shapes alone. Cells are kept in results/production.json, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

import autoprune
from autoprune.application.apply import applying
from autoprune.application.repair import Manner
from autoprune.application.timed import latency_facts
from autoprune.application.training import Training
from autoprune.criteria import build_criterion
from autoprune.database.batches import chunks, gather
from autoprune.evaluator.settings import Settings
from autoprune.families import analyze
from autoprune.files.job import Job
from autoprune.files.whole import write_whole
from autoprune.front import Point
from autoprune.losses.kl import kl
from autoprune.policy import Policy
from autoprune.protocols import Task, finished
from autoprune.recovery._distilled import Distilled
from autoprune.run.prepare import prepare
from autoprune.run.setting import Setting
from autoprune.space import Space, restrict
from benchmarks.large import resnet50
from benchmarks.others import OTHERS, macs, recalibrated
from benchmarks.resnet20 import images

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "production.json"
FOUND = HERE / "results" / "search-again" / "arms"
ARMS = ("evolution", "knapsack", "uniform", "global")
EPOCHS, STEPS, BATCH, TRAIN = 5.0, 300, 64, 15_904
Cell = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="recipes,others,slicing")
    parser.add_argument("--arms", default=",".join((*ARMS, *OTHERS)))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-production"))
    parser.add_argument("--show", action="store_true", help="the table of what there is")
    args = parser.parse_args()
    cells: dict[str, Cell] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name, measure in () if args.show else asked(args):
        if name not in cells:
            started = time.process_time()
            load = round(os.getloadavg()[0], 1)
            cells[name] = {**measure(), "seconds": round(time.process_time() - started), "load": load}
            write_whole(RESULTS, json.dumps(cells, indent=1, sort_keys=True) + "\n")
            print(name, cells[name], flush=True)
    print(table(cells))


def asked(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Cell]]]:
    """The cells by name, and how each is measured."""
    bench, only, arms = Bench(args.out), args.only.split(","), args.arms.split(",")
    if "recipes" in only or "others" in only:
        yield "dense", bench.dense_cell
    for seed in range(args.seeds if "recipes" in only else 0):
        for at, schedule in (("0.5", "one_shot"), ("0.5", "iterative"), ("0.7", "one_shot"), ("0.3", "one_shot")):
            for arm in (a for a in ARMS if a in arms and (at == "0.5" or seed == 0)):
                yield f"recipe|{arm}|{at}|{schedule}|{seed}", partial(bench.recipe, arm, at, schedule, seed)
    for arm in (a for a in OTHERS if a in arms and "others" in only):
        for seed in range(args.seeds):
            yield f"recipe|{arm}|0.5|one_shot|{seed}", partial(bench.other, arm, seed)
    if "slicing" in only:
        yield "slicing", slicing


class Bench:
    """The task, its dense model and its test images, made when something must be measured."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._made: tuple[Task, nn.Module, list[Any], list[Tensor]] | None = None
        self._setting: Setting | None = None

    def dense_cell(self) -> Cell:
        return self._figures(self._world[1])

    def recipe(self, arm: str, at: str, schedule: str, seed: int) -> Cell:
        """A policy of the search, before any training and after the recovery."""
        task, dense, _, _ = self._world
        widths = json.loads((FOUND / f"{arm}-0.json").read_text(encoding="utf-8"))["policies"][at]
        point = self._point(widths)
        given = Settings(calibration=3072, validation=1024, loss="kl", seed=seed)
        found: Cell = {}
        for name, training in (("before", Training("none")), ("after", Training("full", EPOCHS, schedule))):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                manner = Manner(given, build_criterion("obs"), training)
                made = finished(applying(point, dense, task.example_inputs(), task, manner))
            found[name] = self._figures(made.model)
        return {**found, "macs": float(point.ratio("macs")), **self._latency(made.model)}

    def other(self, arm: str, seed: int) -> Cell:
        """Someone else's network, as it is cut, with its norms set right, and after two courses."""
        task, dense, _, _ = self._world
        self._out.mkdir(parents=True, exist_ok=True)
        more = (self._out / f"{arm}.pth",) if arm == "fastnas" else ()
        model = recalibrated(OTHERS[arm](task, 0.5, *more), task)
        example = task.example_inputs()[0][:1]
        found: Cell = {"before": self._figures(model), "macs": macs(model, example) / macs(dense, example)}
        start = {name: value.clone() for name, value in model.state_dict().items()}
        for name, steps in (("short", STEPS), ("after", round(EPOCHS * TRAIN / BATCH))):
            model.load_state_dict(start)
            Distilled(learning_rate=0.02).course(model, dense, task, steps, seed).advance(steps)
            found[name] = self._figures(model.eval())
        return {**found, **self._latency(model)}

    @property
    def _world(self) -> tuple[Task, nn.Module, list[Any], list[Tensor]]:
        if self._made is None:
            task = images()
            dense = task.build().eval()
            test = [part for whole in gather(task.split("test"), 10_000) for part in chunks(whole, 250)]
            with torch.no_grad():
                self._made = task, dense, test, [task.outputs(dense, batch) for batch in test]
        return self._made

    def _point(self, widths: Mapping[str, int]) -> Point:
        """A point as a search would export it."""
        if self._setting is None:
            job = {
                "task": {"factory": "benchmarks.resnet20:images"},
                "space": {"granularity": "channel", "include": ["layer*.conv1"], "multiple_of": 1},
                "evaluator": {"calibration": 3072, "validation": 1024, "fitness": "refit", "precision": "fp32"},
                "executor": {"kind": "inline"},
            }
            self._setting = prepare(Job.from_dict(job), self._out / "base")
        setting = self._setting
        policy = Policy.of(widths)
        keep = {name: tuple(setting.database.keep(name, width).tolist()) for name, width in widths.items()}
        array = policy.array(setting.structure)
        ratios = {name: float(cost(array)) for name, cost in setting.problem.costs.items()}
        costs = {f"{name}_ratio": ratio for name, ratio in ratios.items()}
        costs |= {name: round(ratio * setting.base.costs[name]) for name, ratio in ratios.items()}
        return Point("p00", policy, keep, costs, {"validation": {"name": "kl", "loss": 0.0}}, {}, 0, setting.base)

    def _figures(self, model: nn.Module) -> Cell:
        task, _, test, dense = self._world
        losses: list[float] = []
        right = 0
        with torch.no_grad():
            for batch, wanted in zip(test, dense, strict=True):
                outputs = task.outputs(model.eval(), batch)
                losses += kl(outputs, wanted, classes=-1).tolist()
                right += int((outputs.argmax(-1) == batch[1]).sum())
        return {"kl": mean(losses), "accuracy": right / len(losses)}

    def _latency(self, model: nn.Module) -> Cell:
        task, dense, _, _ = self._world
        found = latency_facts(dense, model.eval(), (task.example_inputs()[0][:1],), "onnxruntime")
        return {"latency": found["ratio"], "iqr": found["iqr"]} if isinstance(found, dict) else {"untimed": found}


def slicing() -> Cell:
    """A ResNet-50 at random widths, cut by shapes alone: the call of `apply`, its checks by experiment included."""
    from tests.points import front_over

    model, inputs = resnet50().eval(), (torch.randn(2, 3, 224, 224),)
    structure = restrict(analyze(model, inputs), Space(granularity=("channel",)))
    front = front_over(model, inputs, structure=structure)
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = autoprune.apply(front[0], model, inputs)
    return {"apply_s": round(time.process_time() - started, 2), "parameters": _numbers(small) / _numbers(model)}


def _numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def table(cells: Mapping[str, Cell]) -> str:
    """Arms down: accuracy before and after, KL after, time; mean and spread over the seeds."""
    rows: dict[tuple[str, ...], list[Cell]] = {}
    for key, cell in cells.items():
        if key.startswith("recipe|"):
            rows.setdefault(tuple(key.split("|")[1:4]), []).append(cell)
    heads = ("arm", "MACs", "schedule", "before", f"{STEPS} steps", f"{EPOCHS:g} epochs", "KL", "time")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (arm, _, schedule), some in sorted(rows.items(), key=lambda row: (row[0][1], row[0][2], row[0][0])):
        shown = [_spread([100 * c[stage]["accuracy"] for c in some if stage in c]) for stage in STAGES]
        figures = (
            _spread([c["after"]["kl"] for c in some], 3),
            _spread([c["latency"] for c in some if "latency" in c]),
        )
        lines.append(f"| {arm} | {mean(c['macs'] for c in some):.3f} | {schedule} | {' | '.join((*shown, *figures))} |")
    others = [f"{name}: {cells[name]}" for name in ("dense", "slicing") if name in cells]
    return "\n".join((*lines, *others))


STAGES = ("before", "short", "after")


def _spread(values: Sequence[float], digits: int = 2) -> str:
    if not values:
        return "-"
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
