"""Search against its peers on ResNet-20 (CIFAR-10, JPEG set) at equal ledgers; what is measured is kept, nothing twice.

usage: OMP_NUM_THREADS=1 python -m benchmarks.search [--out DIR] [--trials 300] [--seeds 3 | 0,2] [--steps 300]
       [--arms a,b] [--only search,test,tuned]
       python -m benchmarks.search --show      tables and curves of what there is; measures nothing

A ledger of 300 full evaluations (768 images repaired, 1 536 scored) serves the whole range of budgets. Every arm gets
the same repair. A searcher's point at a budget is the best on held-back images; KL and accuracy are measured on all
10 000 test images, which nothing else has seen, before and after 300 fine-tuning steps; the hypervolume on 1 024
validation images.

Every finished arm and every score is one small file under --results, so that machines can share the work: what is
there is not measured again. --out holds the raw run folders, in which an arm that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np

from autoprune import plugins
from autoprune.allocation.sensitivity import table_cost
from autoprune.comparison.checks import checked_seeds, parse_seeds
from autoprune.comparison.comparison import N_CURVE
from autoprune.errors import InputError, did_you_mean
from autoprune.evaluation import Ask, Evaluation
from autoprune.executors._lazy import Lazy
from autoprune.executors.local import Local
from autoprune.files.job import Job
from autoprune.files.whole import write_whole
from autoprune.policy import Policy
from autoprune.protocols import Executor
from autoprune.record.record import Record, Stage
from autoprune.run.before import measured_table
from autoprune.run.exported import measured_on
from autoprune.run.ledger import Prices
from autoprune.run.loop import evaluate_all
from autoprune.run.prepare import prepare
from autoprune.run.run import Run
from autoprune.run.setting import Setting
from benchmarks.resnet20 import on_test
from benchmarks.search_figure import draw
from benchmarks.search_results import DENSE, Arm, Score, Store, Tables

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
STAGES = {"test": "refit", "tuned": "tune"}
TASK = "benchmarks.resnet20:images"
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    args = parsed(sys.argv[1:])
    store = Store(args.results)
    if not args.show:
        measure(args, store)
    publish(store, args.figure)


def parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-search"), help="raw run folders")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "search")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "search-curves.svg")
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seeds", default="3", help="so many from 0 on, or a list: 0,2 or 1,")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--include", nargs="+", default=["layer*.conv1"], help="groups; '*' takes the padded stream too"
    )
    parser.add_argument("--arms", default=",".join((*CLOSED, *SEARCHERS)))
    parser.add_argument("--only", default=",".join(("search", *STAGES)), help="stages to run")
    parser.add_argument("--show", action="store_true", help="print and draw what --results holds")
    args = parser.parse_args(words)
    args.arms, args.only = args.arms.split(","), args.only.split(",")
    for name in args.arms:
        if name not in (*CLOSED, *SEARCHERS):
            raise InputError(f"--arms: unknown arm {name!r}; {did_you_mean(name, (*CLOSED, *SEARCHERS))}")
    args.seeds = checked_seeds(parse_seeds(args.seeds), 0)
    return args


def measure(args: argparse.Namespace, store: Store) -> None:
    """Whatever of the asked arms, seeds and stages the results do not hold yet."""
    store.claim({"task": TASK, "budgets": list(BUDGETS), "trials": args.trials, "steps": args.steps})
    base = Base(args, store)
    if "search" in args.only:
        for seed in args.seeds:
            for name in args.arms:
                if name in SEARCHERS or seed == 0:  # a closed form knows no chance
                    find(args, store, base, name, seed)
    for stage, tier in STAGES.items():
        if stage in args.only:
            test(args, store, base, tier)


def publish(store: Store, figure: Path) -> None:
    """The tables, on the screen and beside the results; the curves."""
    names = (*CLOSED, *SEARCHERS)
    text = Tables(store, names).text()
    print(text)
    write_whole(store.path / "tables.md", text)
    arms = sorted(store.arms(), key=lambda a: (a.name in names and names.index(a.name), a.seed))
    draw(arms, BUDGETS, store.protocol["trials"], figure)


class Base:
    """The setting that all arms share, made when something must be measured."""

    def __init__(self, args: argparse.Namespace, store: Store) -> None:
        self._args, self._store = args, store
        self._plain: Setting | None = None

    @property
    def plain(self) -> Setting:
        """Without the sensitivity table."""
        if self._plain is None:
            args = self._args
            self._plain = prepare(job(args), args.out / "base", shared=args.out / "shared")
        return self._plain

    @property
    def tabled(self) -> Setting:
        """With it; the database's folder keeps it, the results what it took."""
        made: list[Setting] = []
        folder, plain = self._args.out / "base", self.plain
        plan = plain.table_plan(self._args.trials)
        path = plain.table_path(plan)

        def drive() -> Iterator[Evaluation]:
            evaluate = partial(evaluated, plain, folder, stage="table")
            made.append(plain.with_table((yield from measured_table(plain.structure, path, plan, evaluate))))

        for _ in drive():
            pass
        self._store.share(table_cost(path))
        return made[0]


def job(
    args: argparse.Namespace, sampler: str = "random", options: Mapping[str, Any] | None = None, seed: int = 0
) -> Job:
    return Job.from_dict(
        {
            "task": {"factory": TASK},
            "space": {"granularity": "channel", "include": args.include},
            "budget": {"macs": [0.25, 0.9], "at": list(BUDGETS)},
            "search": {"sampler": sampler, "trials": args.trials, "seed": seed, "options": dict(options or {})},
            "evaluator": {
                **{"calibration": 3072, "validation": 1024, "fitness": "refit", "precision": "fp32"},
                **{"finalists": 0, "finetune_steps": args.steps},
            },
            "executor": {"workers": args.workers, "timeout_s": 3600},
        }
    )


def find(args: argparse.Namespace, store: Store, base: Base, name: str, seed: int) -> None:
    """Run an arm, or what is left of it, into the results."""
    folder = args.out / (name if name in CLOSED else f"{name}-{seed}")
    if store.arm(name, seed) is not None:
        return
    arm = closed(base.tabled, folder, name) if name in CLOSED else searched(args, folder, name, seed)
    store.add_arm(arm)
    load = f"load {os.getloadavg()[0]:.1f}"
    print(f"{name} seed {seed}: {arm.passes:.0f} passes, {arm.seconds:.0f} s, {load}", flush=True)


def evaluated(
    setting: Setting,
    folder: Path,
    asks: Sequence[tuple[str, Ask]],
    stage: Stage = "final",
    executor: Executor | None = None,
) -> Iterator[Evaluation]:
    executor = executor or Lazy(setting.executor)
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
    device = measured_on(setting.settings, setting.latency) | {"precision": setting.settings.precision}
    return Arm(name, 0, policies, points, {}, sum(e.seconds for e in done), 0.0, device)


def searched(args: argparse.Namespace, folder: Path, name: str, seed: int) -> Arm:
    """A sampler's run on its own ledger, its point at a budget by the held-back images."""
    sampler, options = SEARCHERS[name]
    before = folder / "policy.json"  # of a finished run: a replay writes it anew, as if measured here
    place = device_of(before) if before.exists() else None
    the_job = job(args, sampler, options, seed)
    run = Run(the_job, folder, alone=prepare(the_job, folder, shared=args.out / "shared")).finish()
    by_id = {p.id: p.policy for p in run.front}
    policies = {row["budget"]: by_id[row["point"]] for row in run.summary if row["point"] is not None}
    trials = [t for t in run.study.get_trials(deepcopy=False) if t.user_attrs["stage"] in ("seed", "search")]
    facts = [t.user_attrs for t in trials]
    front = [(p.ratio("macs"), p.loss()) for p in run.front]
    seconds, passes = (sum(f[k] for f in facts) for k in ("seconds", "passes"))
    curve = best_so_far(facts, run.setting.prices)
    return Arm(name, seed, policies, front, curve, seconds, passes, place or device_of(before))


def device_of(path: Path) -> dict[str, Any]:
    """Where, and in which precision, the run of a policy.json was measured."""
    policy = json.loads(path.read_text(encoding="utf-8"))
    return {**policy["measured_on"], "precision": policy["space"].get("precision", "unknown")}


def best_so_far(facts: Sequence[Mapping[str, Any]], price: Prices) -> dict[float, list[tuple[float, float]]]:
    """At each budget (spent, least full fitness loss), a point whenever it falls."""
    spent, best = 0.0, dict.fromkeys(BUDGETS, np.inf)
    curve: dict[float, list[tuple[float, float]]] = {at: [] for at in BUDGETS}
    dummy, stages = Policy.of({"x": 1}), get_args(Stage)
    for f in sorted(facts, key=lambda f: (stages.index(f["stage"]), f["ask"])):
        spent += price.full(Ask(dummy, f["tier"], f["fraction"]), "refit") if f["passes"] or "error" in f else 0.0
        if f["tier"] != "refit" or f["fraction"] < 1.0 or "loss" not in f:
            continue
        for at in BUDGETS:
            if f["costs"]["macs"] <= at + 1e-9 and f["loss"] < best[at]:
                best[at] = f["loss"]
                curve[at].append((spent, f["loss"]))
    return curve


def test(args: argparse.Namespace, store: Store, base: Base, tier: str) -> None:
    """The dense model and the arms' policies on the test images, each once."""
    arms = [a for a in store.arms() if a.name in args.arms and (a.seed in args.seeds)]
    wanted = dict.fromkeys(p for a in arms for p in a.policies.values() if store.score(tier, p.digest) is None)
    if not wanted and store.score(tier, DENSE) is not None:
        return
    setting = base.plain
    dense = Policy.dense(setting.structure)
    wanted = dict.fromkeys([*([] if store.score(tier, DENSE) else [dense]), *wanted])
    asks = [(p.digest, Ask(p, tier, split="validation")) for p in wanted]  # type: ignore[arg-type]
    make = partial(on_test, setting.evaluator_factory())
    part = setting.job.executor
    workers = Lazy(lambda: Local(make, part.n_workers, part.timeout_s, part.retries))
    for i, e in enumerate(evaluated(setting, args.out / "test", asks, executor=workers), start=1):
        print(f"{tier} {i}/{len(asks)}: {e.loss:.4f} {dict(e.metrics)} {e.error or ''}", flush=True)
        if e.ok:
            losses = np.array(e.sample_losses, dtype=np.float16)
            word = DENSE if e.ask.policy == dense else e.ask.policy.digest
            store.add_score(tier, word, Score(e.loss, e.metrics["accuracy"], e.seconds, losses))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
