"""Evaluations a second of ResNet-20 (JPEG set), from one process and from several that share the device.

usage: OMP_NUM_THREADS=1 python -m benchmarks.throughput [--processes 1,2] [--tier refit] [--asks 15]

An evaluation repairs on 768 images and scores 1 536, in float32; every process has its own evaluator and evaluates
random policies of 25 to 100 % of each width, on its grid, two before the clock starts. Several processes on one GPU
want NVIDIA's MPS: `nvidia-cuda-mps-control -d`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import torch

from autoprune.evaluation import Ask, Tier
from autoprune.policy import Policy
from autoprune.protocols import EvaluatorFactory
from autoprune.run.exported import measured_on
from autoprune.run.prepare import prepare
from autoprune.structure import Group, Structure
from benchmarks.search import job

PATIENCE_S = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--tier", choices=["stitch", "refit", "tune"], default="refit")
    parser.add_argument("--asks", type=int, default=15)
    args = parser.parse_args()
    the_job = job(argparse.Namespace(trials=300, steps=300, workers=1, include=["layer*.conv1"]))
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(the_job, Path(folder))
        factory = setting.evaluator_factory()
        print(f"{measured_on(setting.settings, None)['device']}, {args.tier}, load {os.getloadavg()[0]:.1f}\n")
        print("| processes | seconds an evaluation | evaluations a second |\n|---|---|---|")
        for n in (int(word) for word in args.processes.split(",")):
            slowest = max(seconds_of(n, factory, setting.structure, args.tier, args.asks))
            print(f"| {n} | {slowest / args.asks:.3f} | {n * args.asks / slowest:.1f} |", flush=True)


def seconds_of(n: int, factory: EvaluatorFactory, structure: Structure, tier: Tier, asks: int) -> list[float]:
    """What each of `n` processes takes for `asks` evaluations, all at once."""
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(n), context.Queue()
    workers = [context.Process(target=work, args=(i, start, answers, factory, structure, tier, asks)) for i in range(n)]
    for worker in workers:
        worker.start()
    seconds = [answers.get(timeout=PATIENCE_S) for _ in workers]
    for worker in workers:
        worker.join()
    return seconds


def work(
    seed: int,
    start: Barrier,
    answers: Queue[float],
    factory: EvaluatorFactory,
    structure: Structure,
    tier: Tier,
    asks: int,
) -> None:
    """One process."""
    torch.set_num_threads(1)
    evaluate, rng = factory(), np.random.default_rng(seed)

    def once() -> None:
        policy = Policy.of({g.name: drawn(g, rng) for g in structure.groups})
        evaluation = evaluate(Ask(policy, tier))
        assert evaluation.ok, evaluation.error

    once()
    once()
    start.wait()
    began = time.perf_counter()
    for _ in range(asks):
        once()
    answers.put(time.perf_counter() - began)


def drawn(group: Group, rng: np.random.Generator) -> int:
    """A width of a group's grid, from a quarter of it up to all."""
    return int(rng.choice([width for width in group.grid if width >= group.width // 4]))


if __name__ == "__main__":
    main()
