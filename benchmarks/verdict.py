"""How often `compare`'s verdict says beat or worse where two arms are equally good, by seeds and by what dominates.

    python benchmarks/verdict.py [--runs 20000] [--samples 64] [--write]

Differences are seed effect + sample effect + noise of their own; `spread` is the seeds' standard error over that of
the samples: 0 where samples dominate, 100 where seeds do. The expected rate is 5 %, the bar 6 %. Rows "one-sided"
show what no interval over few seeds can hold: a search against a closed form, its luck skewed to one side.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from autoprune.estimates import crossed

SEEDS, SPREADS = (2, 3, 5, 10), (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 100.0)
SHAPES: dict[str, Callable[[np.random.Generator, tuple[int, int]], npt.NDArray[np.float64]]] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "heavy-tailed": lambda rng, size: rng.laplace(scale=2**-0.5, size=size),
    "one-sided": lambda rng, size: rng.exponential(size=size) - 1.0,
}
ABOUT = (
    "",
    "Spread: the seeds' standard error over that of the samples. Two equal arms differ symmetrically (normal, "
    "heavy-tailed): at most 6 %. One-sided luck, as of a search against a closed form in the worst case, no interval "
    "over few seeds can hold.",
)
OUT = Path(__file__).parent / "results" / "verdict.md"


def false_verdicts(shape: str, n_seeds: int, n_samples: int, spread: float, runs: int) -> float:
    """The share of `runs` in which equal arms are told apart."""
    rng, draw, wrong = np.random.default_rng(0), SHAPES[shape], 0
    for _ in range(runs):
        seeds = spread * np.sqrt(n_seeds / n_samples) * draw(rng, (n_seeds, 1))
        table = seeds + rng.normal(size=(1, n_samples)) + rng.normal(size=(n_seeds, n_samples))
        _, low, high = crossed(table)
        wrong += low > 0 or high < 0
    return wrong / runs


def main() -> None:
    """Print the table; with --write into the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    how = f"(`python benchmarks/verdict.py --runs {args.runs} --write`)"
    lines = [f"False verdicts at 95 %, {args.runs} runs, {args.samples} samples, generator seed 0 {how}", ""]
    lines += [f"| seed effects | seeds | {' | '.join(f'spread {s:g}' for s in SPREADS)} |", "|---" * 10 + "|"]
    for shape in SHAPES:
        for n in SEEDS:
            rates = [false_verdicts(shape, n, args.samples, spread, args.runs) for spread in SPREADS]
            lines.append(f"| {shape} | {n} | {' | '.join(f'{rate:.1%}' for rate in rates)} |")
            print(lines[-1], flush=True)
    if args.write:
        OUT.write_text("\n".join([*lines, *ABOUT]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
