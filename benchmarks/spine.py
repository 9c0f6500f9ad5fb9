"""Speed, memory and quality of the spine on ResNet-20, as ratios measured side by side in one run.

usage: python benchmarks/spine.py [--only candidates,repairs,proxy,naive,memory,database]
Every part prints a table in Markdown; one thread. The data are described in the README.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autoprune import plugins
from autoprune.allocation.budget import project
from autoprune.database.batches import StatisticsOnly, prepare, size
from autoprune.database.build import build_database
from autoprune.evaluation import Ask
from autoprune.evaluator.memory import keep_blocks
from autoprune.evaluator.prepared import prepared_model, prepared_parts
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.files.job import Job
from autoprune.policy import Policy
from autoprune.protocols import Task
from autoprune.run.prepare import prepare as prepare_setting
from autoprune.run.setting import Setting
from autoprune.tasks._cifar_resnet import resnet56
from autoprune.tracing.analyze import analyze
from autoprune.tracing.wiring import batch_norms

CPU = torch.device("cpu")
JOB = Path(__file__).resolve().parents[1] / "search_spaces" / "cifar10_resnet20.yaml"


def main() -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")  # as in a worker: evaluate.bound_kernel_cache
    keep_blocks()
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="candidates,repairs,naive,memory,database,proxy")
    parser.add_argument("--steps", type=int, default=300, help="fine-tuning steps of the proxy's truth")
    parser.add_argument("--policies", type=int, default=16)
    args = parser.parse_args()
    setting = prepare_setting(Job.load(JOB), Path(tempfile.mkdtemp()))
    evaluator = setting.evaluator_factory()()
    assert isinstance(evaluator, TieredEvaluator)
    for part in args.only.split(","):
        print(f"\n### {part} (load {os.getloadavg()[0]:.1f})", flush=True)
        PARTS[part](setting, evaluator, args)


def candidates(setting: Setting, evaluator: TieredEvaluator, args: argparse.Namespace) -> None:
    """Wall of one evaluation over the wall of as many bare forward passes of the same slim model and samples."""
    row("inner widths", "stitch / forward of 512", "refit / forward of 512", "refit / forward of its 1024 samples")
    batches = [b[0] for b in evaluator.batches("fitness")[:2]]
    statistics_batch = evaluator.parts.statistics[0][0]
    assert sum(len(b) for b in batches) == len(statistics_batch) == 512
    for share in (1.0, 0.75, 0.5):
        policy, other = uniform_widths(setting, share), uniform_widths(setting, share * 0.9)
        model = evaluator.stitcher.stitch(policy)

        @torch.no_grad()
        def bare(model: nn.Module = model) -> None:
            for x in batches:
                model(x)

        def evaluation(tier: str, policy: Policy = policy, other: Policy = other) -> Callable[[], None]:
            def run() -> None:
                evaluator.stitcher.stitch(other)  # so that every group changes its width
                start = time.perf_counter()
                evaluator(Ask(policy, tier, 0.5))  # type: ignore[arg-type]
                spent.append(time.perf_counter() - start)

            spent: list[float] = []
            run.spent = spent  # type: ignore[attr-defined]
            return run

        stitch, refit, forward = evaluation("stitch"), evaluation("refit"), []
        for _ in range(9):  # interleaved, so that the machine's drift meets all alike
            stitch()
            refit()
            evaluator.stitcher.stitch(policy)
            start = time.perf_counter()
            bare()
            forward.append(time.perf_counter() - start)
        ratios = [[a / b for a, b in zip(f.spent[1:], forward[1:], strict=True)] for f in (stitch, refit)]  # type: ignore[attr-defined]
        row(f"{share:.0%}", spread(ratios[0]), spread(ratios[1]), spread([r / 2 for r in ratios[1]]))


def repairs(setting: Setting, evaluator: TieredEvaluator, args: argparse.Namespace) -> None:
    """Accuracy on the exact test images and KL on fitness images of each repair."""
    test = [prepare(b, CPU, torch.channels_last) for b in setting.task.split("test")]
    row("inner widths", "repair", "KL", "test accuracy")
    for share in (1.0, 0.75, 0.5):
        policy = uniform_widths(setting, share)
        for name in ("database only", "plain batch norm", "fixed-point batch norm", "refit"):
            model = repaired(evaluator, policy, name)
            loss = evaluator.fidelity(evaluator.batches("fitness"), "fitness", direct=False)
            row(f"{share:.0%}", name, f"{loss:.4f}", f"{100 * setting.task.metrics(model, test)['accuracy']:.2f} %")


def proxy(setting: Setting, evaluator: TieredEvaluator, args: argparse.Namespace) -> None:
    """Rank correlation of every tier with the KL after 300 steps, over random policies at 50 % of the MACs."""
    from scipy.stats import spearmanr

    rng, found = np.random.default_rng(0), []
    for _ in range(args.policies):
        raw = rng.uniform(0.1, 1.0, len(setting.structure))
        found.append(project(setting.structure, setting.problem.costs, raw, {"macs": 0.5}))
    tiers: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for name in ("database only", "plain batch norm", "fixed-point batch norm", "refit"):
        start = time.perf_counter()
        tiers[name] = []
        for policy in found:
            repaired(evaluator, policy, name)
            tiers[name].append(evaluator.fidelity(evaluator.batches("fitness"), "fitness", direct=False))
        seconds[name] = (time.perf_counter() - start) / len(found)
    for steps in (100, args.steps):
        evaluator.settings = replace(evaluator.settings, finetune_steps=steps)
        start = time.perf_counter()
        tiers[f"{steps} steps"] = [evaluator(Ask(p, "tune")).loss for p in found]
        seconds[f"{steps} steps"] = (time.perf_counter() - start) / len(found)
    truth = np.array(tiers[f"{args.steps} steps"])
    better = truth <= np.median(truth)
    row("tier", f"rank correlation with {args.steps} steps", "within the better half", "median KL", "s a policy")
    for name, losses in tiers.items():
        values = np.array(losses)
        whole, half = spearmanr(values, truth)[0], spearmanr(values[better], truth[better])[0]
        row(name, f"{whole:.2f}", f"{half:.2f}", f"{np.median(values):.3f}", f"{seconds[name]:.1f}")


def naive(setting: Setting, evaluator: TieredEvaluator, args: argparse.Namespace) -> None:
    """Against deepcopy, torch-pruning's pruner, batch norm recalibration and evaluation on the same widths."""
    dense, task = prepared_model(setting.task, CPU), setting.task
    fitness = evaluator.batches("fitness")
    teacher = [evaluator.samples.reference("fitness", i, b).outputs for i, b in enumerate(fitness)]
    row(
        "inner widths",
        "naive s",
        "stitch s",
        "refit s",
        "times faster (stitch, refit)",
        "KL naive",
        "KL stitch",
        "KL refit",
    )
    for share in (0.75, 0.5):
        policy, other = uniform_widths(setting, share), uniform_widths(setting, 0.9 * share)
        times: dict[str, list[float]] = {"naive": [], "stitch": [], "refit": []}
        losses: dict[str, float] = {}
        for _ in range(5):
            start = time.perf_counter()
            losses["naive"] = naive_candidate(dense, task, policy, evaluator, fitness, teacher)
            times["naive"].append(time.perf_counter() - start)
            for tier in ("stitch", "refit"):
                evaluator.stitcher.stitch(other)
                start = time.perf_counter()
                losses[tier] = evaluator(Ask(policy, tier)).loss  # type: ignore[arg-type]
                times[tier].append(time.perf_counter() - start)
        t = {k: statistics.median(v) for k, v in times.items()}
        faster = f"{t['naive'] / t['stitch']:.1f}, {t['naive'] / t['refit']:.1f}"
        row(f"{share:.0%}", *(f"{t[k]:.2f}" for k in t), faster, *(f"{losses[k]:.3f}" for k in t))


def memory(setting: Setting, evaluator: TieredEvaluator, args: argparse.Namespace) -> None:
    """Resident memory after 2 000 candidates over that after 100."""
    rng, held = np.random.default_rng(0), {}
    for i in range(1, 2001):
        policy = Policy.of({g.name: int(rng.choice(g.grid)) for g in setting.structure.groups})
        evaluator(Ask(policy, "refit" if i % 10 == 0 else "stitch", 1 / 8))
        if i in (100, 500, 1000, 2000):
            gc.collect()
            held[i] = resident_bytes()
    row("candidates", "resident MiB", "over 100 candidates")
    for i, value in held.items():
        row(i, f"{value / 2**20:.0f}", f"{value / held[100]:.3f}")


def database(setting: Setting, evaluator: TieredEvaluator, args: argparse.Namespace) -> None:
    """Seconds to build the level database: all widths of all groups."""
    row("model", "groups", "analysis s", "database s", "MB")
    for name, model in (("ResNet-20", prepared_model(setting.task, CPU)), ("ResNet-56", fresh(resnet56()))):
        start = time.perf_counter()
        structure = analyze(model, setting.task.example_inputs())
        analysed = time.perf_counter()
        seen = StatisticsOnly(setting.task, prepared_parts(setting.task, Settings(), model).statistics)
        started = time.perf_counter()
        built = build_database(model, structure, seen, plugins.load("criteria", "obs")())
        seconds = time.perf_counter() - started
        stored = [t for levels in built.levels.values() for t in levels.plain()[0].values()]
        mega = sum(t.numel() * t.element_size() for t in stored) / 1e6
        row(name, len(structure), f"{analysed - start:.1f}", f"{seconds:.1f}", f"{mega:.0f}")


def naive_candidate(
    dense: nn.Module,
    task: Task,
    policy: Policy,
    evaluator: TieredEvaluator,
    fitness: Sequence[Any],
    teacher: Sequence[Any],
) -> float:
    """One candidate as people do it today: L1 norm, slice a deep copy, recalibrate the batch norms, evaluate."""
    import torch_pruning as tp

    model, example = copy.deepcopy(dense), task.example_inputs()[0]
    modules = dict(model.named_modules())
    widths = policy.as_dict()
    ratios = {modules[n]: 1.0 - w / modules[n].out_channels for n, w in widths.items()}  # type: ignore[operator]
    others = [m for m in modules.values() if isinstance(m, nn.Conv2d | nn.Linear) and m not in ratios]
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.0,
        pruning_ratio_dict=ratios,
        ignored_layers=others,
    )
    pruner.step()
    recalibrate(model, evaluator.parts.statistics[0][0])
    with torch.no_grad():
        total = sum(
            size(b)
            * float(
                torch.nn.functional.kl_div(
                    model(b[0]).log_softmax(1), t.log_softmax(1), log_target=True, reduction="batchmean"
                )
            )
            for b, t in zip(fitness, teacher, strict=True)
        )
    return total / sum(size(b) for b in fitness)


def repaired(evaluator: TieredEvaluator, policy: Policy, repair: str) -> nn.Module:
    if repair in ("refit", "fixed-point batch norm"):
        return evaluator.repaired(Ask(policy, "refit" if repair == "refit" else "stitch"))
    model = evaluator.stitcher.stitch(policy)
    if repair == "plain batch norm":
        recalibrate(model, evaluator.parts.statistics[0][0])
        evaluator.stitcher.mark_dirty()
    return model


def recalibrate(model: nn.Module, x: torch.Tensor) -> None:
    """Plain recalibration: running statistics replaced by those of the calibration samples."""
    norms = batch_norms(model).values()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model(x)
    for norm in norms:
        norm.eval()
        norm.momentum = 0.1


def uniform_widths(setting: Setting, share: float) -> Policy:
    return Policy.of({g.name: max(g.grid[0], round(share * g.width)) for g in setting.structure.groups})


def fresh(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload,no-any-return]


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}..{max(values):.2f})"


def row(*cells: object) -> None:
    print("| " + " | ".join(str(c) for c in cells) + " |", flush=True)


PARTS = {f.__name__: f for f in (candidates, repairs, proxy, naive, memory, database)}

if __name__ == "__main__":
    main()
