"""Does a wide window cost quality? The front at the same ledger for windows of 16, 64 and 256, on ResNet-20.

usage: OMP_NUM_THREADS=1 python -m benchmarks.windows [--windows 16,64,256] [--seeds 3] [--trials 300] [--sampler NAME]
       [--out DIR] [--show]

A window is how many asks are in flight, so a sampler answers to what it knew that many asks ago, whatever the number of
workers. Few samples (768: 192 repair, 384 score) make a search take minutes; the hypervolume is that of the front on
1 024 validation images, reference point as everywhere. Cells are kept in results/windows.json: what is there is not
measured again, and a search that was cut off goes on in --out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from autoprune.files.job import Job
from autoprune.files.whole import write_whole
from autoprune.run.prepare import prepare
from autoprune.run.run import Run

RESULTS = Path(__file__).resolve().parent / "results" / "windows.json"
BUDGETS = (0.7, 0.5, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", default="16,64,256")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--sampler", default="evolution")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-windows"))
    parser.add_argument("--show", action="store_true", help="the table of what there is")
    args = parser.parse_args()
    kept: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for seed in () if args.show else range(args.seeds):
        for window in map(int, args.windows.split(",")):
            name = f"{args.sampler}-{args.trials}-{window}-{seed}"
            if name not in kept:
                kept[name] = measured(args, name, window, seed)
                write_whole(RESULTS, json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
                print(name, kept[name], flush=True)
    print(table(kept))


def measured(args: argparse.Namespace, name: str, window: int, seed: int) -> dict[str, Any]:
    """The hypervolume of a search, and its best held-back loss at each budget."""
    job = Job.from_dict(
        {
            "task": {"factory": "benchmarks.resnet20:images"},
            "space": {"granularity": "channel"},
            "budget": {"macs": [0.25, 0.9], "at": list(BUDGETS)},
            "search": {"sampler": args.sampler, "trials": args.trials, "seed": seed, "window": window},
            "evaluator": {
                **{"calibration": 768, "validation": 1024, "fitness": "refit", "precision": "fp32"},
                **{"finalists": 0, "finetune_steps": 0},
            },
            "executor": {"kind": "inline"},
        }
    )
    folder = args.out / name
    run = Run(job, folder, alone=prepare(job, folder, shared=args.out / "shared")).finish()
    facts = dict(run.front.provenance)["hypervolume"]
    found = {f"{at:g}": run.front.select(macs=at).loss() for at in BUDGETS}
    load = round(os.getloadavg()[0], 1)
    return {**{"window": window, "seed": seed, "sampler": args.sampler, "trials": args.trials}, "load": load} | {
        "hypervolume": facts["value"],
        "reference": facts["reference"],
        "loss": found,
    }


def table(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a window: mean and spread over the seeds."""
    rows = [
        "| sampler | trials | window | seeds | hypervolume | loss at .7 | .5 | .3 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in sorted({(c["sampler"], c["trials"], c["window"]) for c in kept.values()}):
        cells = [c for c in kept.values() if (c["sampler"], c["trials"], c["window"]) == key]
        figures = [[c["hypervolume"] for c in cells], *([c["loss"][f"{at:g}"] for c in cells] for at in BUDGETS)]
        shown = (f"{mean(v):.4g} ± {stdev(v):.2g}" if len(v) > 1 else f"{v[0]:.4g}" for v in figures)
        rows.append(f"| {key[0]} | {key[1]} | {key[2]} | {len(cells)} | {' | '.join(shown)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
