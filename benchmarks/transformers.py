"""Transformers: MiniLM-L6 on the STS benchmark, and a small Llama on stories: rules, searches and their parts.

usage: OMP_NUM_THREADS=1 python -m benchmarks.transformers [minilm | stories] [--arms a,b] [--seeds 3] [--trials 60]
       [--only search,test,tuned,latency] [--out DIR] [--show]

Of MiniLM's calibration pairs 256 repair, 512 are scored, 256 held back; a ledger of 60 full evaluations serves all
budgets, and every searched arm has the same. A searcher's point at a budget is its best on held-back pairs. Figures are
of the test split, which nothing else has seen: the squared distance to the dense vectors and Spearman, or the loss and
the perplexity. Rules are measured with the repair (`full`) and without (`none`). Searches evaluate in the precision
that suits the machine, all figures of the tables are of float32. Cells are kept in results/transformers.json, and what
is there is not measured again; a search that was cut off goes on in --out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from autoprune import plugins
from autoprune.allocation.sensitivity import load_table
from autoprune.estimates import spearman
from autoprune.evaluation import Ask
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.files.job import Job
from autoprune.policy import Policy
from autoprune.run.prepare import prepare
from autoprune.run.setting import Setting
from benchmarks.cells import keep, points, read
from benchmarks.transformer_rules import block_influence, shortgpt

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "transformers.json"
DATA = HERE.parents[1] / "shared" / "data"
TOKENS, BATCHES = (32, 128), (1, 16)
TIMED, ROUNDS = 30, 3
DISTILLED = 100
FEW = 3
RULES = "benchmarks.transformer_rules"


@dataclass(frozen=True)
class World:
    """A model with its data: the task, the budgets, and how many samples an evaluation sees."""

    task: Mapping[str, Any]
    budgets: tuple[float, ...]
    low: float
    calibration: int
    validation: int
    layers: str


@dataclass(frozen=True)
class Arm:
    """How policies are found: by a strategy, by a sampler, or by ShortGPT's rule; over which kinds, ranked how."""

    strategy: str = ""
    sampler: str = ""
    kinds: tuple[str, ...] = ("auto",)
    criterion: str = "obs"
    budgets: tuple[float, ...] = ()

    @property
    def by_chance(self) -> bool:
        """Whether seeds make a difference."""
        return bool(self.sampler)


WORLDS = {
    "minilm": World(
        {
            "name": "text_embedding",
            "args": {
                **{"model": str(DATA / "minilm_l6"), "train": str(DATA / "sts_benchmark" / "stsb_train.csv")},
                **{"test": str(DATA / "sts_benchmark" / "stsb_test.csv"), "max_length": 32},
            },
        },
        *((0.7, 0.5, 0.3), 0.25, 1024, 512, "encoder.layer"),
    ),
    "stories": World(
        {
            "name": "causal_lm",
            "args": {
                **{"model": str(DATA / "stories260K"), "context": 256, "tokens": 102_400},
                **dict.fromkeys(("train", "test"), str(DATA / "stories260K" / "tiny_stories_ids.npy")),
                **{"n_calibration": 192, "n_validation": 96},
            },
        },
        *((0.8, 0.7, 0.6), 0.55, 192, 96, "model.layers"),
    ),
}
WIDTHS = ("head", "neuron")
ARMS = {
    "uniform": Arm(strategy="uniform"),
    "global": Arm(strategy="global"),
    "minitron": Arm(strategy="uniform", kinds=WIDTHS, criterion=f"{RULES}:ActivationNorm"),
    "flap": Arm(strategy=f"{RULES}:flap", kinds=WIDTHS, criterion=f"{RULES}:Fluctuation"),
    "shortgpt": Arm(strategy="shortgpt", kinds=("block",)),
    "knapsack": Arm(strategy="knapsack"),
    "evopress": Arm(sampler="benchmarks.evopress:EvoPress"),
    "evolution": Arm(sampler="evolution"),
    "depth_width": Arm(sampler="depth_width"),
    "widths": Arm(sampler="evolution", kinds=WIDTHS),
    "fluctuation": Arm(sampler="evolution", kinds=WIDTHS, criterion=f"{RULES}:Fluctuation"),
    "neurons": Arm(sampler="evolution", kinds=("neuron",), budgets=(0.5,)),
    "heads": Arm(sampler="evolution", kinds=("head",), budgets=(0.75,)),  # all of them are less than a third
    "blocks": Arm(sampler="evolution", kinds=("block",), budgets=(0.5,)),
}
UNREPAIRED = ("uniform", "global", "minitron", "flap", "shortgpt", "knapsack")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("world", nargs="?", choices=[*WORLDS], default="minilm")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--only", default="search,test,tuned,latency")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-transformers"))
    parser.add_argument("--show", action="store_true", help="the tables of what there is")
    args = parser.parse_args()
    args.out = args.out / args.world
    kept = read(RESULTS)
    cells: dict[str, Any] = kept.setdefault(args.world, {})
    keep(RESULTS, kept, cells, () if args.show else measured(args, cells))
    print("\n\n".join(tables(cells, WORLDS[args.world].budgets)))


def measured(args: argparse.Namespace, cells: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Whatever is asked for and not there yet, cell by cell."""
    world, only = WORLDS[args.world], args.only.split(",")
    arms = {name: ARMS[name] for name in args.arms.split(",")}
    for name, arm in arms.items():
        for seed in range(args.seeds if arm.by_chance else 1):
            wanted = [at for at in arm.budgets or world.budgets if f"policy|{name}|{seed}|{at:g}" not in cells]
            if "search" in only and wanted:
                for at, found in found_by(args, world, name, seed).items():
                    yield f"policy|{name}|{seed}|{at:g}", found
    scorers: dict[tuple[Any, ...], Scorer] = {}
    for key in [k for k in cells if k.startswith("policy|")]:
        _, name, seed, at = key.split("|")
        if name not in arms or int(seed) >= args.seeds or not cells[key]["widths"]:
            continue
        for stage, repair in stages(name, at, only):
            cell = f"{stage}|{repair}|{name}|{seed}|{at}"
            if cell not in cells:
                how = (arms[name].kinds, arms[name].criterion, repair)
                if how not in scorers:
                    scorers = {how: Scorer(setting_of(args, world, arms[name], repair))}
                yield cell, scorers[how](Policy.of(cells[key]["widths"]), stage)


def stages(name: str, at: str, only: Sequence[str]) -> Iterator[tuple[str, str]]:
    if "test" in only:
        yield "test", "full"
        if name in UNREPAIRED:
            yield "test", "none"
    if at == "0.5" and "tuned" in only:
        yield "tuned", "full"
    if at == "0.5" and "latency" in only and name in ("uniform", "knapsack", "evolution", "depth_width"):
        yield "latency", "full"


def job_of(world: World, arm: Arm, trials: int, repair: str = "full", seed: int = 0, precision: str = "fp32") -> Job:
    budgets = arm.budgets or world.budgets
    return Job.from_dict(
        {
            "task": dict(world.task),
            "space": {"granularity": "auto" if arm.kinds == ("auto",) else list(arm.kinds)},
            "criterion": arm.criterion,
            "budget": {"macs": [0.95 * min(arm.budgets, default=world.low / 0.95), 0.9], "at": list(budgets)},
            "search": {"sampler": arm.sampler or "random", "trials": trials, "seed": seed},
            "evaluator": {
                **{"calibration": world.calibration, "validation": world.validation, "fitness": "refit"},
                **{"finalists": 0, "finetune_steps": DISTILLED, "precision": precision, "repair": repair},
            },
            "executor": {"kind": "inline"},
        }
    )


def setting_of(args: argparse.Namespace, world: World, arm: Arm, repair: str = "full") -> Setting:
    folder = args.out / "-".join(("base", *arm.kinds, arm.criterion.rpartition(":")[2], repair))
    return prepare(job_of(world, arm, args.trials, repair), folder, shared=args.out / "shared")


def found_by(args: argparse.Namespace, world: World, name: str, seed: int) -> dict[float, Any]:
    """An arm's policies by budget, and what they took."""
    arm, started = ARMS[name], time.process_time()
    budgets = arm.budgets or world.budgets
    if arm.sampler:
        policies = searched(args, world, name, seed)
    else:
        setting = setting_of(args, world, arm)
        policies = closed(args, world, setting, arm)
    spent = round(time.process_time() - started, 1)
    return {
        at: {"widths": policies[at].as_dict() if at in policies else {}, "seconds": spent if i == 0 else 0.0}
        for i, at in enumerate(budgets)
    }


def closed(args: argparse.Namespace, world: World, setting: Setting, arm: Arm) -> dict[float, Policy]:
    problem = setting.problem
    if arm.strategy == "shortgpt":
        model = setting.task.build().eval()
        layers = [n for n, _ in model.named_modules() if n.rpartition(".")[0] == world.layers]
        influence = block_influence(model, setting.task, layers)
        return {at: shortgpt(setting.structure, influence, problem.costs["macs"], at) for at in world.budgets}
    if arm.strategy == "knapsack":
        setting = setting.with_table(tabled(args, world))
    strategy = plugins.load("strategies", arm.strategy)
    return {at: strategy(setting.problem, at) for at in world.budgets}


def tabled(args: argparse.Namespace, world: World) -> Any:
    """The sensitivity table over all kinds, in the precision of the searches; the first one measures it for all."""
    job = job_of(world, ARMS["evolution"], args.trials, precision="auto")
    setting = prepare(job, args.out / "evolution-0", shared=args.out / "shared")
    path = setting.table_path(setting.table_plan(args.trials))
    if not path.exists():
        searched(args, world, "evolution", 0)
    return load_table(path)


def searched(args: argparse.Namespace, world: World, name: str, seed: int) -> dict[float, Policy]:
    """A sampler's point at each budget, by the held-back samples; a run that was cut off goes on."""
    arm = ARMS[name]
    job = job_of(world, arm, args.trials, seed=seed, precision="auto")
    folder = args.out / f"{name}-{seed}"
    return points(job, folder, args.out / "shared")


class Scorer:
    """Figures of policies on the test split, or after the brief distillation, or on onnxruntime."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.evaluator: TieredEvaluator = setting.evaluator_factory()()
        self.batches = list(setting.task.split("test"))
        self._runtime = plugins.load("runtimes", "onnxruntime")
        self._dense = self._outputs(self.evaluator.dense)

    def __call__(self, policy: Policy, stage: str) -> dict[str, Any]:
        started = time.process_time()
        model = self.evaluator.repaired(Ask(policy, "tune" if stage == "tuned" else "refit"))
        costs = {n: float(c(policy.array(self.setting.structure))) for n, c in self.evaluator.costs.items()}
        absent = [g.name for g in self.setting.structure if g.kind == "block" and not policy.as_dict()[g.name]]
        found = self._latency(model) if stage == "latency" else self._figures(model)
        return {**found, "macs": costs["macs"], "absent": absent, "seconds": round(time.process_time() - started, 1)}

    def _figures(self, model: Any) -> dict[str, float]:
        losses = [self.evaluator.measure(a, b) for a, b in zip(self._outputs(model), self._dense, strict=True)]
        metrics = {k: float(v) for k, v in self.setting.task.metrics(model, self.batches).items()}
        return {"loss": float(torch.cat(losses).mean()), **metrics}

    def _outputs(self, model: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return [self.setting.task.outputs(model, batch) for batch in self.batches]

    def _latency(self, model: Any) -> dict[str, float]:
        """Median times of dense over those of the model, run in turns on one thread, by batch and tokens."""
        found: dict[str, float] = {}
        for batch in BATCHES:
            for tokens in TOKENS:
                ids = torch.randint(1000, 2000, (batch, tokens))
                inputs = ({"input_ids": ids, "attention_mask": torch.ones_like(ids)},)
                runs = [self._runtime()(m, inputs, 1) for m in (self.evaluator.dense, model)]
                times: list[list[float]] = [[], []]
                for _ in range(TIMED):
                    for run, seen in zip(runs, times, strict=True):
                        start = time.perf_counter()
                        run()
                        seen.append(time.perf_counter() - start)
                found[f"speedup_{batch}x{tokens}"] = float(np.median(times[0][ROUNDS:]) / np.median(times[1][ROUNDS:]))
        return found


def tables(cells: Mapping[str, Any], budgets: Sequence[float]) -> Iterator[str]:
    """One table a stage and repair: arms down, budgets across; mean and spread over the seeds."""
    for stage, repair, words in (
        ("test", "full", "with the repair, before training"),
        ("test", "none", "cut alone, before training"),
        ("tuned", "full", f"after {DISTILLED} steps of distillation"),
        ("latency", "full", "onnxruntime, one thread: dense time over theirs"),
    ):
        rows: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
        for key, cell in cells.items():
            parts = key.split("|")
            if parts[:2] == [stage, repair]:
                rows.setdefault(parts[2], {}).setdefault(parts[4], []).append(cell)
        if rows:
            ats = [f"{at:g}" for at in budgets]
            lines = [f"| {words} | {' | '.join(ats)} |", "|---" * (len(ats) + 1) + "|"]
            for name in sorted(rows, key=[*ARMS].index):
                lines.append(f"| {name} | {' | '.join(shown(rows[name].get(at, [])) for at in ats)} |")
            yield "\n".join(lines)
    if (pairs := before_and_after(cells)) and len(pairs) > FEW:
        losses = [[cell["loss"] for cell in pair] for pair in pairs.values()]
        found = spearman(*(np.array(column) for column in zip(*losses, strict=True)))
        yield f"rank correlation of {len(pairs)} candidates before and after distillation: {found:.2f}"


def before_and_after(cells: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The cells of every policy that was distilled, repaired and after."""
    tuned = {key.partition("|")[2]: cell for key, cell in cells.items() if key.startswith("tuned|")}
    return {key: (cells[f"test|{key}"], cell) for key, cell in tuned.items() if f"test|{key}" in cells}


def shown(cells: Sequence[Mapping[str, Any]]) -> str:
    """Figures of the seeds of a cell: loss / metric, or speed-ups; and how many blocks are gone."""
    if not cells:
        return "-"
    names = [n for n in cells[0] if n not in ("macs", "absent", "seconds", "load")]
    texts = []
    for name in names:
        values = [float(c[name]) for c in cells]
        texts.append(f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else ""))
    gone = mean(len(c["absent"]) for c in cells)
    return " / ".join(texts) + (f" ({gone:.1f} blocks gone)" if gone else "")


if __name__ == "__main__":
    main()
