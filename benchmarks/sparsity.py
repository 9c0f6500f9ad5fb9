"""Zeros that stay in the tensor, on ResNet-20: how they are spread over the layers, before and after training.

usage: OMP_NUM_THREADS=1 python -m benchmarks.sparsity [--arms a,b] [--at 0.3,0.1] [--seeds 3] [--trials 100]
       [--short 40] [--only search,test,tuned] [--out DIR] [--show]

All 19 matrices but the stem's; a density is the share of their numbers that stays. Rules take the scores that their
papers do: magnitudes (uniform, erk, global, lamp), |w| |x| (owl), or the least squares' (global_obs). Searches have one
ledger at .5 and .3 with the repair as their fitness, and one of --short trials at .1 and .05, where every network is
dead before training, with a brief fine-tune of 30 steps. Every policy is then scored on the 10 000 test images with two
masks, each after its own repair: by magnitude, the batch norms set right (`magnitude`), and by SparseGPT with the least
squares within the mask and the sequential refit (`obs`); and again after 300 steps of distillation within the mask.
Cells are kept in results/sparsity.json, and what is there is not measured again.
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
from autoprune.evaluation import Ask
from autoprune.files.job import Job
from autoprune.policy import Policy
from autoprune.run.prepare import prepare
from autoprune.run.setting import Setting
from benchmarks.cells import keep, points, read
from benchmarks.resnet20 import OnTest

RESULTS = Path(__file__).resolve().parent / "results" / "sparsity.json"
STEPS, BRIEF = 300, 30
MASKS = {"magnitude": ("l1_norm", "norm"), "obs": ("obs", "full")}
"""Criterion and repair by the words of the table."""
LEDGERS = {"0.5": "refit", "0.3": "refit", "0.1": "tune", "0.05": "tune"}
"""What judges a search at a density."""


@dataclass(frozen=True)
class Arm:
    """How policies are found: by a strategy on a criterion's scores, or by a sampler; at which densities."""

    strategy: str = ""
    criterion: str = "l1_norm"
    sampler: str = ""
    at: tuple[str, ...] = ("0.3", "0.1")


ALL = tuple(LEDGERS)
ARMS = {
    "uniform": Arm("uniform"),
    "global": Arm("global"),
    "global_obs": Arm("global", "obs"),
    "erk": Arm("erk", at=ALL),
    "lamp": Arm("lamp", at=ALL),
    "owl": Arm("owl", "wanda"),
    "knapsack": Arm("knapsack", "obs", at=ALL),
    "evopress": Arm(sampler="benchmarks.evopress:EvoPress"),
    "amc": Arm(sampler="amc", at=("0.3",)),
    "evolution": Arm(sampler="evolution", at=ALL),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--at", default=",".join(ALL))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="search,test,tuned")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--short", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-sparsity"))
    parser.add_argument("--show", action="store_true", help="the table of what there is")
    args = parser.parse_args()
    cells = read(RESULTS)
    keep(RESULTS, cells, cells, () if args.show else measured(args, cells))
    print(table(cells))


def measured(args: argparse.Namespace, cells: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Whatever is asked for and not there yet: policies, then their figures."""
    names, only = args.arms.split(","), args.only.split(",")
    if "search" in only:
        for name in names:
            yield from policies_of(args, name, cells)
    scorers: dict[str, Scorer] = {}
    for key in [k for k in cells if k.startswith("policy|")]:
        _, name, seed, at = key.split("|")
        if name not in names or at not in args.at.split(",") or int(seed) >= args.seeds or not cells[key]["widths"]:
            continue
        for stage, mask in ((s, m) for s in ("test", "tuned") if s in only for m in MASKS):
            if (cell := f"{stage}|{mask}|{name}|{seed}|{at}") not in cells:
                if mask not in scorers:
                    scorers = {mask: Scorer(setting_of(args, *MASKS[mask]))}
                yield cell, scorers[mask](cells[key]["widths"], stage)


def policies_of(args: argparse.Namespace, name: str, cells: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What an arm finds at the densities that are asked for, ledger by ledger."""
    arm = ARMS[name]
    for seed in range(args.seeds if arm.sampler else 1):
        for fitness in dict.fromkeys(LEDGERS.values()):
            wanted = [at for at in arm.at if at in args.at.split(",") and LEDGERS[at] == fitness]
            if any(f"policy|{name}|{seed}|{at}" not in cells for at in wanted):
                for at, found in found_by(args, name, seed, fitness).items():
                    yield f"policy|{name}|{seed}|{at}", found


def job_of(criterion: str, repair: str, fitness: str, sampler: str = "random", trials: int = 1, seed: int = 0) -> Job:
    ats = [float(at) for at, judge in LEDGERS.items() if judge == fitness]
    return Job.from_dict(
        {
            "task": {"factory": "benchmarks.resnet20:images"},
            "space": {"granularity": "weight", "exclude": ["conv1.weight"]},
            "criterion": criterion,
            "objectives": {"costs": ["nonzeros"]},
            "budget": {"nonzeros": [0.8 * min(ats), 1.3 * max(ats)], "at": ats},
            "search": {"sampler": sampler, "trials": trials, "seed": seed},
            "evaluator": {
                **{"calibration": 3072, "validation": 1024, "fitness": fitness, "precision": "auto", "repair": repair},
                **{"finalists": 0, "finetune_steps": BRIEF if fitness == "tune" else STEPS},
            },
            "executor": {"kind": "inline"},
        }
    )


def setting_of(args: argparse.Namespace, criterion: str, repair: str, fitness: str = "refit") -> Setting:
    folder = args.out / f"base-{criterion}-{repair}-{fitness}"
    return prepare(job_of(criterion, repair, fitness), folder, shared=args.out / "shared")


def found_by(args: argparse.Namespace, name: str, seed: int, fitness: str) -> dict[str, Any]:
    """An arm's policies at the densities of a ledger, and what they took."""
    arm, started = ARMS[name], time.process_time()
    ats = [at for at in arm.at if LEDGERS[at] == fitness]
    if arm.sampler:
        policies = searched(args, arm.sampler, name, seed, fitness)
    else:
        setting = setting_of(args, arm.criterion, "full", fitness)
        if arm.strategy == "knapsack":
            setting = setting.with_table(tabled(args, fitness))
        strategy = plugins.load("strategies", arm.strategy)
        policies = {float(at): strategy(setting.problem, float(at)) for at in ats}
    spent = round(time.process_time() - started, 1)
    found = {at: policies[float(at)].as_dict() if float(at) in policies else {} for at in ats}
    return {at: {"widths": widths, "seconds": 0.0 if i else spent} for i, (at, widths) in enumerate(found.items())}


def searched(args: argparse.Namespace, sampler: str, name: str, seed: int, fitness: str) -> dict[float, Policy]:
    """A sampler's point at each density, by the held-back samples; a run that was cut off goes on."""
    job = job_of("obs", "full", fitness, sampler, args.trials if fitness == "refit" else args.short, seed)
    folder = args.out / f"{name}-{fitness}-{seed}"
    return points(job, folder, args.out / "shared")


def tabled(args: argparse.Namespace, fitness: str) -> Any:
    """The sensitivity table that evolution measured first."""
    trials = args.trials if fitness == "refit" else args.short
    job = job_of("obs", "full", fitness, "evolution", trials)
    setting = prepare(job, args.out / f"evolution-{fitness}-0", shared=args.out / "shared")
    path = setting.table_path(setting.table_plan(trials))
    if not path.exists():
        searched(args, "evolution", "evolution", 0, fitness)
    return load_table(path)


class Scorer:
    """Figures of widths on the test images, repaired, or repaired and trained."""

    def __init__(self, setting: Setting) -> None:
        self._structure = setting.structure
        self._on_test = OnTest(setting.evaluator_factory()())

    def __call__(self, widths: Mapping[str, int], stage: str) -> dict[str, Any]:
        policy = Policy.from_array(self._structure, [widths[name] for name in self._structure.names])
        found = self._on_test(Ask(policy, "tune" if stage == "tuned" else "refit"))
        shown = {name: float(found.costs[name]) for name in ("nonzeros",)}
        figures = {"kl": found.loss, "accuracy": found.metrics["accuracy"], "seconds": round(found.seconds, 1)}
        return {**figures, **shown}


def table(cells: Mapping[str, Any]) -> str:
    """One table a density: arms down; KL and accuracy by mask, before and after training."""
    parts = []
    for at in ALL:
        rows: dict[str, dict[tuple[str, str], list[Mapping[str, Any]]]] = {}
        for key, cell in cells.items():
            stage, *where = key.split("|")
            if stage != "policy" and where[3] == at:
                rows.setdefault(where[1], {}).setdefault((stage, where[0]), []).append(cell)
        if not rows:
            continue
        columns = [(stage, mask) for stage in ("test", "tuned") for mask in MASKS]
        words = [f"{mask}{f', {STEPS} steps' if stage == 'tuned' else ''}" for stage, mask in columns]
        lines = [f"| density {at} | {' | '.join(words)} |", "|---" * (len(columns) + 1) + "|"]
        for name in sorted(rows, key=[*ARMS].index):
            lines.append(f"| {name} | {' | '.join(_shown(rows[name].get(c, [])) for c in columns)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _shown(some: Sequence[Mapping[str, Any]]) -> str:
    if not some:
        return "-"
    kl, right = [c["kl"] for c in some], [100 * c["accuracy"] for c in some]
    spread = [f" ± {stdev(v):.{d}f}" if len(v) > 1 else "" for v, d in ((kl, 3), (right, 1))]
    return f"{mean(kl):.3f}{spread[0]} / {mean(right):.1f}{spread[1]}"


if __name__ == "__main__":
    main()
