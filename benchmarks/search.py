"""Search against its peers on ResNet-20 (CIFAR-10, JPEG set) at equal ledgers; resumable, a run folder an arm and seed.

usage: OMP_NUM_THREADS=1 python -m benchmarks.search [--out DIR] [--trials 300] [--seeds 3] [--steps 300] [--arms a,b]

A ledger of 300 full evaluations (768 images repaired, 1 536 scored) serves the whole range of budgets. Every arm gets
the same repair. A searcher's point at a budget is the best on held-back images; KL and accuracy are measured on all
10 000 test images, which nothing else has seen, before and after 300 fine-tuning steps; the hypervolume on 1 024
validation images.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from autoprune import plugins
from autoprune.bootstrap import paired
from autoprune.cells import LEAST_LOSS, REFERENCE
from autoprune.compare_ import N_CURVE
from autoprune.evaluation import Ask, Evaluation
from autoprune.executors.local import Local
from autoprune.front import hypervolume
from autoprune.job import Job
from autoprune.ledger import Prices
from autoprune.opening import with_table
from autoprune.policy import Policy
from autoprune.protocols import Executor
from autoprune.search_ import Run
from autoprune.setting import Setting, prepare
from autoprune.study import Record, Stage, evaluate_all
from benchmarks.resnet20 import on_test

BUDGETS = (0.7, 0.5, 0.3)
CLOSED = ("uniform", "global", "lamp", "erk", "fastnas", "knapsack")
SEARCHERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "random": ("random", {}),
    "tpe": ("tpe", {}),
    "nsga2": ("nsga2", {}),
    "amc-classic": ("amc", {"profile": "classic"}),
    "amc": ("amc", {}),
    "evopress": ("benchmarks.evopress:EvoPress", {}),
    "evolution": ("evolution", {}),
}


def job(
    args: argparse.Namespace, sampler: str = "random", options: Mapping[str, Any] | None = None, seed: int = 0
) -> Job:
    return Job.from_dict(
        {
            "task": {"factory": "benchmarks.resnet20:images"},
            "budget": {"macs": [0.25, 0.9], "at": list(BUDGETS)},
            "search": {"sampler": sampler, "trials": args.trials, "seed": seed, "options": dict(options or {})},
            "evaluator": {
                **{"calibration": 3072, "validation": 1024, "fitness": "refit"},
                **{"finalists": 0, "finetune_steps": args.steps},
            },
            "executor": {"workers": args.workers, "timeout_s": 3600},
        }
    )


@dataclass(frozen=True)
class Arm:
    """What an arm found with one seed: a policy at each budget, its front on validation, its curve."""

    name: str
    seed: int
    policies: Mapping[float, Policy]
    front: Sequence[tuple[float, float]]
    curve: Mapping[float, Sequence[tuple[float, float]]]
    seconds: float
    passes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-search"))
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--arms", default=",".join((*CLOSED, *SEARCHERS)))
    parser.add_argument("--only", default="search,test,tuned", help="stages to run; what is on disk is not repeated")
    args = parser.parse_args()
    arms = list(found_arms(args, args.arms.split(",")))
    setting = prepare(job(args), args.out / "base", shared=args.out / "shared")
    scores = {t: tested(setting, args.out / "test", arms, t) for t in ("refit", "tune") if stage_of(t) in args.only}
    publish(args, arms, scores)


def stage_of(tier: str) -> str:
    return "tuned" if tier == "tune" else "test"


def found_arms(args: argparse.Namespace, names: Sequence[str]) -> Iterator[Arm]:
    base = prepare(job(args), args.out / "base", shared=args.out / "shared")
    problem, cost = tabled(base, args.out / "base")
    print(f"sensitivity table: {cost}; {len(base.structure)} groups", flush=True)
    for seed in range(args.seeds):
        for name in names:
            if name in CLOSED and seed > 0:
                continue
            arm = closed(problem, args.out / name, name) if name in CLOSED else searched(args, name, seed)
            print(
                f"{name} seed {seed}: {arm.passes:.0f} passes, {arm.seconds:.0f} s, load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
            yield arm


def tabled(setting: Setting, folder: Path) -> tuple[Setting, str]:
    """The setting with its table, and what that cost."""
    made: list[Setting] = []

    def drive() -> Iterator[Evaluation]:
        made.append((yield from with_table(setting, lambda asks: evaluated(setting, folder, asks, "table"))))

    done = list(drive())
    passes, seconds = sum(e.passes for e in done), sum(e.seconds for e in done)
    return made[0], f"{len(done)} evaluations, {passes:.1f} passes, {seconds:.0f} s (0 where it was on disk)"


def evaluated(
    setting: Setting,
    folder: Path,
    asks: Sequence[tuple[str, Ask]],
    stage: Stage = "final",
    executor: Executor | None = None,
) -> Iterator[Evaluation]:
    executor = executor or setting.executor()
    try:
        with Record(folder, setting.structure, ("macs",), setting.tier, setting.identity) as record:
            yield from evaluate_all(record, executor, asks, stage)
    finally:
        executor.close()


def closed(setting: Setting, folder: Path, name: str) -> Arm:
    """A strategy's policies; its front at targets over the range, on validation."""
    strategy = plugins.load("strategies", name)
    problem = setting.problem
    policies = {at: strategy(problem, at) for at in BUDGETS}
    targets = [float(t) for t in np.linspace(problem.budget.low, problem.budget.high, N_CURVE)]
    front = dict.fromkeys([*policies.values(), *(strategy(problem, t) for t in targets)])
    asks = [(p.digest, Ask(p, "refit", split="validation")) for p in front]
    done = list(evaluated(setting, folder, asks))
    points = [(e.costs["macs"], e.loss) for e in done if e.ok]
    return Arm(name, 0, policies, points, {}, sum(e.seconds for e in done), 0.0)


def searched(args: argparse.Namespace, name: str, seed: int) -> Arm:
    """A sampler's run on its own ledger, its point at a budget by the held-back images."""
    sampler, options = SEARCHERS[name]
    folder = args.out / f"{name}-{seed}"
    run = Run(job(args, sampler, options, seed), folder, alone=True, shared=args.out / "shared").finish()
    by_id = {p.id: p.policy for p in run.front}
    policies = {row["budget"]: by_id[row["point"]] for row in run.summary if row["point"] is not None}
    trials = [t for t in run.study.get_trials(deepcopy=False) if t.user_attrs["stage"] in ("seed", "search")]
    facts = [t.user_attrs for t in trials]
    front = [(p.ratio("macs"), p.metrics["validation"]["loss"]) for p in run.front]
    curve = best_so_far(facts, prices(args))
    return Arm(name, seed, policies, front, curve, sum(f["seconds"] for f in facts), sum(f["passes"] for f in facts))


def prices(args: argparse.Namespace) -> Prices:
    return Prices(768, 1536, 768, 1024, 128 * args.steps)


def best_so_far(facts: Sequence[Mapping[str, Any]], price: Prices) -> dict[float, list[tuple[float, float]]]:
    """At each budget (spent, least full fitness loss), a point whenever it falls."""
    stages = {"seed": 0, "search": 1}
    spent, best = 0.0, dict.fromkeys(BUDGETS, np.inf)
    curve: dict[float, list[tuple[float, float]]] = {at: [] for at in BUDGETS}
    dummy = Policy.of({"x": 1})
    for f in sorted(facts, key=lambda f: (stages[f["stage"]], f["ask"])):
        spent += price.full(Ask(dummy, f["tier"], f["fraction"]), "refit") if f["passes"] else 0.0
        if f["tier"] != "refit" or f["fraction"] < 1.0 or "loss" not in f:
            continue
        for at in BUDGETS:
            if f["costs"]["macs"] <= at + 1e-9 and f["loss"] < best[at]:
                best[at] = f["loss"]
                curve[at].append((spent, f["loss"]))
    return curve


def tested(setting: Setting, folder: Path, arms: Sequence[Arm], tier: str) -> dict[Policy, Evaluation]:
    """All arms' policies on the test images, each once."""
    policies = dict.fromkeys([Policy.dense(setting.structure), *(p for a in arms for p in a.policies.values())])
    asks = [(p.digest, Ask(p, tier, split="validation")) for p in policies]  # type: ignore[arg-type]
    found = {}
    make = partial(on_test, setting.job.dump(), setting.structure, setting.database_path)
    part = setting.job.executor
    workers = Local(make, part.n_workers, part.timeout_s, part.retries)
    for e in evaluated(setting, folder, asks, executor=workers):
        found[e.ask.policy] = e
        print(f"{tier} {len(found)}/{len(asks)}: {e.loss:.4f} {dict(e.metrics)} {e.error or ''}", flush=True)
    return found


def publish(args: argparse.Namespace, arms: Sequence[Arm], scores: Mapping[str, Mapping[Policy, Evaluation]]) -> None:
    names = list(dict.fromkeys(a.name for a in arms))
    lines = [table(arms, names, tier, found) for tier, found in scores.items()]
    lines += [volumes(arms, names), ratios(arms, scores), differences(arms, names, scores)]
    text = "\n\n".join(lines)
    print(text)
    (args.out / "results.md").write_text(text + "\n", encoding="utf-8")
    document = [{**vars(replace(a)), "policies": {str(k): p.as_dict() for k, p in a.policies.items()}} for a in arms]
    (args.out / "arms.json").write_text(json.dumps(document, indent=1, default=str), encoding="utf-8")


def of_arm(arms: Sequence[Arm], name: str, at: float, found: Mapping[Policy, Evaluation]) -> list[Evaluation]:
    return [found[a.policies[at]] for a in arms if a.name == name and at in a.policies and a.policies[at] in found]


def table(arms: Sequence[Arm], names: Sequence[str], tier: str, found: Mapping[Policy, Evaluation]) -> str:
    title = "after the fine-tune" if tier == "tune" else "before fine-tuning"
    lines = [
        f"**{title}** (test KL ± sd over seeds / accuracy)",
        "",
        "| arm | " + " | ".join(f"{b:.0%}" for b in BUDGETS) + " |",
    ]
    lines.append("|---" * (1 + len(BUDGETS)) + "|")
    for name in names:
        cells = []
        for at in BUDGETS:
            es = [e for e in of_arm(arms, name, at, found) if e.ok]
            losses, accuracy = [e.loss for e in es], [e.metrics["accuracy"] for e in es]
            spread = f" ± {np.std(losses):.3f}" if len(es) > 1 else ""
            cells.append(f"{np.mean(losses):.3f}{spread} / {np.mean(accuracy):.2%}" if es else "none")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def volumes(arms: Sequence[Arm], names: Sequence[str]) -> str:
    lines = [f"**hypervolume** of the validation front (log KL against MACs ratio, reference {REFERENCE})", ""]
    lines += ["| arm | hypervolume ± sd | evaluation seconds |", "|---|---|---|"]
    for name in names:
        own = [a for a in arms if a.name == name]
        hv = [
            hypervolume(np.array([(m, np.log(max(v, LEAST_LOSS))) for m, v in a.front]), np.array(REFERENCE))
            for a in own
        ]
        lines.append(f"| {name} | {np.mean(hv):.4f} ± {np.std(hv):.4f} | {np.mean([a.seconds for a in own]):.0f} |")
    return "\n".join(lines)


def ratios(arms: Sequence[Arm], scores: Mapping[str, Mapping[Policy, Evaluation]]) -> str:
    """Ours over uniform at 50 %: KL, and the fall of accuracy."""
    lines = ["**evolution / uniform at 50 %**", ""]
    for tier, found in scores.items():
        dense = next(iter(found.values())).metrics["accuracy"]
        ours, base = (of_arm(arms, n, 0.5, found) for n in ("evolution", "uniform"))
        if ours and base:
            kl = np.mean([e.loss for e in ours]) / base[0].loss
            drop = (dense - np.mean([e.metrics["accuracy"] for e in ours])) / (dense - base[0].metrics["accuracy"])
            lines.append(f"- {tier}: KL {kl:.2f}, accuracy drop {drop:.2f} (dense {dense:.2%})")
    return "\n".join(lines)


def differences(arms: Sequence[Arm], names: Sequence[str], scores: Mapping[str, Mapping[Policy, Evaluation]]) -> str:
    """Each arm's KL less ours, paired over test images and seeds, with its 95 % bootstrap interval."""
    lines = [
        "**arm less evolution** (test KL, paired over images and seeds, 95 % interval; above 0: evolution is better)",
        "",
    ]
    lines += ["| arm | tier | " + " | ".join(f"{b:.0%}" for b in BUDGETS) + " |", "|---" * (2 + len(BUDGETS)) + "|"]
    for name in names:
        for tier, found in scores.items():
            if name != "evolution":
                lines.append(
                    f"| {name} | {tier} | " + " | ".join(difference(arms, name, at, found) for at in BUDGETS) + " |"
                )
    return "\n".join(lines)


def difference(arms: Sequence[Arm], name: str, at: float, found: Mapping[Policy, Evaluation]) -> str:
    ours, theirs = of_arm(arms, "evolution", at, found), of_arm(arms, name, at, found)
    if not ours or not theirs:
        return "-"
    pairs = [(theirs[i % len(theirs)], e) for i, e in enumerate(ours)]
    rows = np.array([np.array(t.sample_losses) - np.array(o.sample_losses) for t, o in pairs])
    mean, low, high = paired(rows, np.random.default_rng(0))
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


if __name__ == "__main__":
    main()
