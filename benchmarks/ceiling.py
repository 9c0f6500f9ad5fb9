"""How good could any allocation be? Evolution at half the MACs that sees test images, as no search may.

usage: OMP_NUM_THREADS=1 python -m benchmarks.ceiling [--out DIR] [--trials 300]

The whole ledger goes to one budget. The least losses on the images searched with are below what can be had honestly;
those on the other test images say how much of that was chance. Uniform and the arms of `python -m benchmarks.search`
stand beside them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from autoprune import plugins
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.files.job import Job
from autoprune.policy import Policy
from autoprune.run.prepare import prepare
from autoprune.run.run import Run
from autoprune.run.setting import Setting
from benchmarks.resnet20 import CALIBRATION, on_test
from benchmarks.search import ROOT
from benchmarks.search_results import Store

AT = 0.5
BEST = 5
SEARCHED, SEEN = CALIBRATION // 2, CALIBRATION * 3 // 4
"""Test images that are the fitness; those and the held-back ones."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-ceiling"))
    parser.add_argument("--trials", type=int, default=300)
    args = parser.parse_args()
    job = asked(args.trials)
    run = Run(job, args.out, alone=prepare(job, args.out))
    found, setting = list(run), run.setting
    on_images = on_test(setting.evaluator_factory())
    print("| policy | on the images searched with | / uniform | on the other test images | / uniform |")
    print("|---|---|---|---|---|")
    base: tuple[float, float] | None = None
    for name, policy in compared(setting, found):
        losses = np.array(on_images(Ask(policy, "refit", split="validation")).sample_losses)
        seen, others = float(losses[:SEARCHED].mean()), float(losses[SEEN:].mean())
        base = base or (seen, others)
        print(f"| {name} | {seen:.4f} | {seen / base[0]:.3f} | {others:.4f} | {others / base[1]:.3f} |", flush=True)


def asked(trials: int) -> Job:
    return Job.from_dict(
        {
            "task": {"factory": "benchmarks.resnet20:peeking"},
            "budget": {"macs": [0.45, 0.52], "at": [AT]},
            "search": {"sampler": "evolution", "trials": trials, "seed": 0},
            "evaluator": {
                **{"calibration": CALIBRATION, "validation": 256, "fitness": "refit", "precision": "fp32"},
                "finalists": 0,
            },
            "executor": {"workers": 2, "timeout_s": 3600},
        }
    )


def compared(setting: Setting, found: list[Evaluation]) -> Iterator[tuple[str, Policy]]:
    """Uniform first; the best found here; what arms found that know training images alone."""
    yield "uniform", plugins.load("strategies", "uniform")(setting.problem, AT)
    whole = [e for e in found if e.ok and e.ask == Ask(e.ask.policy, "refit") and e.costs["macs"] <= AT + 1e-9]
    losses = {e.ask.policy: e.loss for e in whole}
    for i, policy in enumerate(sorted(losses, key=losses.__getitem__)[:BEST], start=1):
        yield f"best {i}", policy
    for arm in Store(ROOT / "benchmarks" / "results" / "search").arms():
        if arm.name in ("knapsack", "evolution"):
            yield f"{arm.name}, seed {arm.seed}", arm.policies[AT]


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
