"""The front of loss against bytes on ResNet-20: widths and 8 bits searched together, one after the other, bits alone.

usage: OMP_NUM_THREADS=1 python -m benchmarks.bits [--arms joint,then,bits,all8] [--seeds 3] [--trials 120] [--out DIR]
       [--show]

joint: one search of widths and precisions under a budget of bytes. then: the same ledger for widths alone, under the
budget of float32 bytes that comes to the asked one once every weight is stored in 8 bits. bits: precisions alone. all8:
nothing but 8 bits everywhere, unsearched. All are repaired alike by the sequential refit (1 024 samples score), none is
trained; a searched arm's point at a budget is its best on held-back images. Figures are of the 10 000 test images, the
JPEG set. Cells are kept in results/bits.json, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from autoprune.evaluation import Ask
from autoprune.files.job import Job
from autoprune.policy import Policy
from autoprune.run.prepare import prepare
from autoprune.run.setting import Setting
from benchmarks.cells import keep, points, read
from benchmarks.resnet20 import OnTest

RESULTS = Path(__file__).resolve().parent / "results" / "bits.json"
BUDGETS = (0.25, 0.15, 0.1, 0.07)
"""Bytes of the stored weights, as a ratio to float32."""


@dataclass(frozen=True)
class Arm:
    """What is searched, and under which budgets; `then` stores all weights in 8 bits afterwards."""

    space: Mapping[str, Any]
    budgets: tuple[float, ...]
    then: bool = False


BITS = {"bits": [32, 8]}
ARMS = {
    "joint": Arm({"granularity": "auto", **BITS}, BUDGETS),
    "then": Arm({"granularity": "auto"}, tuple(round(3.85 * at, 3) for at in BUDGETS), True),
    "bits": Arm({"granularity": ["bits"]}, (0.7, 0.5, 0.3)),
    "all8": Arm({}, (1.0,), True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-bits"))
    parser.add_argument("--show", action="store_true", help="the table of what there is")
    args = parser.parse_args()
    cells = read(RESULTS)
    keep(RESULTS, cells, cells, () if args.show else measured(args, cells))
    print(table(cells))


def measured(args: argparse.Namespace, cells: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Whatever is asked for and not there yet: policies of each arm, then their figures."""
    names = args.arms.split(",")
    for seed in range(args.seeds):
        for name in names:
            key = f"policies|{name}|{seed}"
            if key not in cells and (name != "all8" or seed == 0):
                started = time.process_time()
                found = {} if name == "all8" else searched(args, name, seed)
                yield key, {"widths": found, "seconds": round(time.process_time() - started, 1)}
    scorer: Scorer | None = None
    for key in [k for k in cells if k.startswith("policies|")]:
        _, name, seed = key.split("|")
        for at, widths in ({"1.0": {}} if name == "all8" else cells[key]["widths"]).items():
            cell = f"test|{name}|{seed}|{at}"
            if name in names and cell not in cells:
                scorer = scorer or Scorer(prepare(job(args, "joint", 0), args.out / "base", shared=args.out / "shared"))
                yield cell, scorer(widths, ARMS[name].then)


def job(args: argparse.Namespace, name: str, seed: int) -> Job:
    arm = ARMS[name]
    return Job.from_dict(
        {
            "task": {"factory": "benchmarks.resnet20:images"},
            "space": dict(arm.space),
            "objectives": {"costs": ["bytes"]},
            "budget": {"bytes": [0.8 * min(arm.budgets), min(0.99, 1.2 * max(arm.budgets))], "at": list(arm.budgets)},
            "search": {"sampler": "evolution", "trials": args.trials, "seed": seed},
            "evaluator": {
                **{"calibration": 3072, "validation": 1024, "fitness": "refit", "precision": "auto"},
                **{"finalists": 0, "finetune_steps": 100},
            },
            "executor": {"kind": "inline"},
        }
    )


def searched(args: argparse.Namespace, name: str, seed: int) -> dict[str, dict[str, int]]:
    """The point at each budget; a run that was cut off goes on."""
    folder = args.out / f"{name}-{seed}"
    found = points(job(args, name, seed), folder)
    return {f"{at:g}": policy.as_dict() for at, policy in found.items()}


class Scorer:
    """Figures of widths on the test images, after the refit."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._on_test = OnTest(setting.evaluator_factory()())

    def __call__(self, widths: Mapping[str, int], all_8_bits: bool) -> dict[str, Any]:
        structure = self._setting.structure
        dense = Policy.dense(structure).as_dict()
        held = {g.name: 8 for g in structure if g.kind == "bits"} if all_8_bits else {}
        policy = Policy.from_array(structure, [({**dense, **widths, **held})[name] for name in structure.names])
        found = self._on_test(Ask(policy, "refit"))
        bits = [w for name, w in policy.widths if name.endswith("@bits")]
        return {
            **{"kl": found.loss, "accuracy": found.metrics["accuracy"], "bytes": float(found.costs["bytes"])},
            **{"macs": float(found.costs["macs"]), "in_8_bits": bits.count(8) / len(bits)},
        }


def table(cells: Mapping[str, Any]) -> str:
    """Arms down; bytes, KL and accuracy, mean and spread over the seeds."""
    rows: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for key, cell in cells.items():
        if key.startswith("test|"):
            _, name, _, at = key.split("|")
            rows.setdefault((name, at), []).append(cell)
    lines = ["| arm | budget | bytes | MACs | in 8 bits | test KL | accuracy |", "|---|---|---|---|---|---|---|"]
    for (name, at), some in sorted(rows.items(), key=lambda row: (row[0][0], -float(row[0][1]))):
        shown = [_spread([float(c[k]) for c in some]) for k in ("bytes", "macs", "in_8_bits", "kl", "accuracy")]
        lines.append(f"| {name} | {at} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
