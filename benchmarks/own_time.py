"""What samplers take for themselves, beside evaluations that cost nothing: processor milliseconds an ask and its tell.

usage: OMP_NUM_THREADS=1 python -m benchmarks.own_time [--samplers evolution,tpe] [--groups 30] [--trials 300]
"""

from __future__ import annotations

import argparse
import os
import time
from collections import deque

import numpy as np

from autoprune.evaluation import Ask
from autoprune.samplers import build_sampler
from tests.synthetic import Hills, chain, make_problem

WINDOW = 16
EVALUATION_S = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samplers", default="evolution,spdy,amc,random,nsga2,tpe")
    parser.add_argument("--groups", type=int, default=30)
    parser.add_argument("--trials", type=int, default=300)
    args = parser.parse_args()
    print(f"{args.groups} groups, {args.trials} trials, load {os.getloadavg()[0]:.1f}\n")
    print(f"| sampler | ms an ask and tell | the slowest twentieth | share of a wall of {EVALUATION_S} s evaluations |")
    print("|---|---|---|---|")
    for name in args.samplers.split(","):
        times = np.array(own_times(name, args.groups, args.trials))
        mean, slow = times.mean(), np.sort(times)[-max(1, len(times) // 20) :].mean()
        print(f"| {name} | {mean * 1e3:.1f} | {slow * 1e3:.1f} | {mean / (mean + EVALUATION_S):.2%} |", flush=True)


def own_times(name: str, n_groups: int, n_trials: int) -> list[float]:
    """Processor seconds of each ask with the tell that made room for it, 16 asks in flight."""
    structure = chain(n_groups)
    problem, evaluate = make_problem(structure, n_trials), Hills(structure)
    sampler = build_sampler(name, problem, np.random.default_rng(0), {})
    flight: deque[Ask] = deque()
    times = []
    for _ in range(n_trials):
        told = evaluate(flight.popleft()) if len(flight) == WINDOW else None
        started = time.process_time()
        if told is not None:
            sampler.tell(told)
        flight.append(sampler.ask())
        times.append(time.process_time() - started)
    return times


if __name__ == "__main__":
    main()
