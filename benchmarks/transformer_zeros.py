"""Zeros in the weights of MiniLM-L6 (the STS benchmark) and of a small Llama (stories), without any training.

usage: OMP_NUM_THREADS=1 python -m benchmarks.transformer_zeros [minilm | stories] [--arms a,b] [--seeds 3]
       [--trials 60] [--out DIR] [--show]

Densities are the share of the numbers of all matrices but the embedding that stays. `wanda` and `sparsegpt` are the
same density everywhere, masks alone and with all that makes up for them; `owl` allocates by outliers of wanda's scores;
`knapsack`, `evopress` and `evolution` search with masks of obs under one ledger. `2:4` holds the pattern everywhere,
`2:4 searched` where the search puts it at as many nonzeros as .75 of them. Repairs, samples and figures are those of
benchmarks.transformers. Cells are kept in results/transformer_zeros.json, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from autoprune import plugins
from autoprune.allocation.sensitivity import load_table
from autoprune.files.job import Job
from autoprune.policy import Policy
from autoprune.run.prepare import prepare
from autoprune.run.setting import Setting
from benchmarks.cells import keep, points, read
from benchmarks.transformers import WORLDS, Scorer

RESULTS = Path(__file__).resolve().parent / "results" / "transformer_zeros.json"
DENSITIES = {"minilm": (0.5, 0.3), "stories": (0.6, 0.5, 0.4)}


@dataclass(frozen=True)
class Arm:
    """A strategy or a sampler, whose criterion makes the masks too unless `masks` is another; repaired how."""

    strategy: str = ""
    sampler: str = ""
    criterion: str = "obs"
    masks: str = "obs"
    repair: str = "full"
    space: str = "weight"
    densities: tuple[float, ...] = ()


PATTERN = "2:4"
ARMS = {
    "magnitude": Arm("uniform", criterion="l1_norm", masks="l1_norm", repair="none"),
    "wanda": Arm("uniform", criterion="wanda", masks="wanda", repair="none"),
    "sparsegpt": Arm("uniform"),
    "global": Arm("global"),
    "owl": Arm("owl", criterion="wanda"),
    "knapsack": Arm("knapsack"),
    "evopress": Arm(sampler="benchmarks.evopress:EvoPress"),
    "evolution": Arm(sampler="evolution"),
    PATTERN: Arm("uniform", space=PATTERN, densities=(0.5,)),
    f"{PATTERN} searched": Arm(sampler="evolution", space=PATTERN, densities=(0.75,)),
    f"{PATTERN} uniform": Arm("uniform", space=PATTERN, densities=(0.75,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("world", nargs="?", choices=[*DENSITIES], default="minilm")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-transformer-zeros"))
    parser.add_argument("--show", action="store_true", help="the table of what there is")
    args = parser.parse_args()
    args.out = args.out / args.world
    kept = read(RESULTS)
    cells: dict[str, Any] = kept.setdefault(args.world, {})
    keep(RESULTS, kept, cells, () if args.show else measured(args, cells))
    print(table(cells))


def measured(args: argparse.Namespace, cells: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Whatever is asked for and not there yet: policies, then their figures."""
    arms = {name: ARMS[name] for name in args.arms.split(",")}
    for name, arm in arms.items():
        for seed in range(args.seeds if arm.sampler else 1):
            wanted = arm.densities or DENSITIES[args.world]
            if any(f"policy|{name}|{seed}|{at:g}" not in cells for at in wanted):
                for at, found in found_by(args, name, seed).items():
                    yield f"policy|{name}|{seed}|{at:g}", found
    scorers: dict[tuple[str, ...], Scorer] = {}
    for key in [k for k in cells if k.startswith("policy|")]:
        _, name, number, _ = key.split("|")
        cell = key.replace("policy", "test", 1)
        if name in arms and int(number) < args.seeds and cells[key]["widths"] and cell not in cells:
            how = (arms[name].masks, arms[name].repair, arms[name].space)
            if how not in scorers:
                scorers = {how: Scorer(setting_of(args, arms[name], arms[name].masks))}
            policy = Policy.of(cells[key]["widths"])
            found = scorers[how](policy, "test")
            costs = scorers[how].setting.problem.costs["nonzeros"]
            yield cell, {**found, "nonzeros": float(costs(policy.array(scorers[how].setting.structure)))}


def job_of(args: argparse.Namespace, arm: Arm, criterion: str, seed: int = 0, precision: str = "fp32") -> Job:
    world, densities = WORLDS[args.world], arm.densities or DENSITIES[args.world]
    low = min(densities) * (1.0 if arm.space == PATTERN else 0.9)
    return Job.from_dict(
        {
            "task": dict(world.task),
            "space": {"granularity": arm.space},
            "criterion": criterion,
            "objectives": {"costs": ["nonzeros"]},
            "budget": {"nonzeros": [low, 0.9], "at": list(densities)},
            "search": {"sampler": arm.sampler or "random", "trials": args.trials, "seed": seed},
            "evaluator": {
                **{"calibration": world.calibration, "validation": world.validation, "fitness": "refit"},
                **{"finalists": 0, "precision": precision, "repair": arm.repair},
            },
            "executor": {"kind": "inline"},
        }
    )


def setting_of(args: argparse.Namespace, arm: Arm, criterion: str) -> Setting:
    words = ("base", arm.space.replace(":", "of"), criterion, arm.repair, *map(str, arm.densities))
    folder = args.out / "-".join(words)
    return prepare(job_of(args, arm, criterion), folder, shared=args.out / "shared")


def found_by(args: argparse.Namespace, name: str, seed: int) -> dict[float, Any]:
    """An arm's policies by density, and what they took."""
    arm, started = ARMS[name], time.process_time()
    densities = arm.densities or DENSITIES[args.world]
    if arm.sampler:
        policies = searched(args, name, seed)
    else:
        setting = setting_of(args, arm, arm.criterion)
        if arm.strategy == "knapsack":
            setting = setting.with_table(tabled(args))
        strategy = plugins.load("strategies", arm.strategy)
        policies = {at: strategy(setting.problem, at) for at in densities}
    spent = round(time.process_time() - started, 1)
    found = {at: policies[at].as_dict() if at in policies else {} for at in densities}
    return {at: {"widths": widths, "seconds": 0.0 if i else spent} for i, (at, widths) in enumerate(found.items())}


def searched(args: argparse.Namespace, name: str, seed: int) -> dict[float, Policy]:
    """A sampler's point at each density, by the held-back samples; a run that was cut off goes on."""
    job = job_of(args, ARMS[name], "obs", seed, "auto")
    folder = args.out / f"{name.replace(':', 'of').replace(' ', '-')}-{seed}"
    return points(job, folder, args.out / "shared")


def tabled(args: argparse.Namespace) -> Any:
    """The sensitivity table that evolution measured first."""
    job = job_of(args, ARMS["evolution"], "obs", precision="auto")
    setting = prepare(job, args.out / "evolution-0", shared=args.out / "shared")
    path = setting.table_path(setting.table_plan(args.trials))
    if not path.exists():
        searched(args, "evolution", 0)
    return load_table(path)


def table(cells: Mapping[str, Any]) -> str:
    """Arms down, densities across: nonzeros, loss and metric, mean and spread over the seeds."""
    rows: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for key, cell in cells.items():
        stage, name, _, at = key.split("|")
        if stage == "test":
            rows.setdefault(name, {}).setdefault(at, []).append(cell)
    ats = sorted({at for some in rows.values() for at in some}, reverse=True)
    lines = [f"| density | {' | '.join(ats)} |", "|---" * (len(ats) + 1) + "|"]
    for name in sorted(rows, key=[*ARMS].index):
        lines.append(f"| {name} | {' | '.join(_shown(rows[name].get(at, [])) for at in ats)} |")
    return "\n".join(lines)


def _shown(some: Sequence[Mapping[str, Any]]) -> str:
    if not some:
        return "-"
    texts = []
    for name in [n for n in some[0] if n not in ("macs", "nonzeros", "absent", "seconds", "load")]:
        values = [float(c[name]) for c in some]
        texts.append(f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else ""))
    return " / ".join(texts)


if __name__ == "__main__":
    main()
