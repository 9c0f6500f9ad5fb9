"""A whole search in a process of its own, to be killed: FOLDER N_TRIALS WORKERS LOG [STORAGE].

WORKERS is a number, 0 for none, or the address of a Ray cluster. See test_resume.py.
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

import numpy as np

from autoprune.evaluation import Ask, Evaluation
from autoprune.executors.inline import Inline
from autoprune.executors.local import Local
from autoprune.pareto import pareto_front
from autoprune.protocols import Executor
from autoprune.record.record import Record
from autoprune.run.loop import evaluate_all, search_loop
from autoprune.samplers import build_sampler
from autoprune.strategies.uniform import uniform
from tests.synthetic import Asks, MakeHills, chain, make_problem

STRUCTURE = chain(6)


def run(folder: Path, n_trials: int, executor: Executor, storage: str | None = None) -> tuple[Evaluation, ...]:
    """Seeds, search, finals; the final front, scored on the validation split."""
    problem = make_problem(STRUCTURE, seeded=False)
    with closing(executor), Record(folder, STRUCTURE, problem.objectives, storage=storage) as record:
        seeds = [(f"uniform@{t}", Ask(uniform(problem, t), "refit")) for t in (0.3, 0.5, 0.7, 0.9)]
        told = list(evaluate_all(record, executor, seeds, "seed"))
        problem = make_problem(STRUCTURE)
        sampler = build_sampler("evolution", problem, np.random.default_rng(0), {"fractions": [0.5, 1.0]})
        told += [e for e in search_loop(record, executor, sampler, Asks(n_trials), window=6) if e.ask.fraction == 1]
        best = pareto_front(told, ("macs",))[:6]
        asks = [(f"final {i}", Ask(e.ask.policy, "tune", split="validation")) for i, e in enumerate(best)]
        return pareto_front(evaluate_all(record, executor, asks, "final"), ("macs",))


def executor_of(make: MakeHills, workers: str) -> Executor:
    """What the command line names."""
    if ":" in workers:
        from autoprune.executors.ray import Ray

        return Ray(make, workers=2, address=workers, resources={"slot": 1.0})
    return Local(make, workers=int(workers)) if int(workers) else Inline(make)


if __name__ == "__main__":
    make = MakeHills(STRUCTURE, seconds=0.01, fail_share=0.05, log=sys.argv[4])
    url = sys.argv[5] if len(sys.argv) > 5 else None
    try:
        run(Path(sys.argv[1]), int(sys.argv[2]), executor_of(make, sys.argv[3]), url)
    except KeyboardInterrupt:
        sys.exit(130)
