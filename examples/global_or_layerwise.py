"""Ask whether layer-wise pruning beats global. usage: python examples/global_or_layerwise.py [OUT_DIR] [TRIALS]."""

import sys
from pathlib import Path

import autoprune

JOB = Path(__file__).parents[1] / "search_spaces" / "digits.yaml"
NOT_LAYERWISE = ("uniform", "global")  # one ratio for all layers; one threshold over all their scores
LAYERWISE = ("knapsack", "evolution")  # solved from the sensitivity table; searched from there on


def main(out: Path, trials: int) -> None:
    job = autoprune.Job.load(JOB, [f"search.trials={trials}"])
    result = autoprune.compare(job, (*NOT_LAYERWISE, *LAYERWISE), budgets=(0.5, 0.3), seeds=2, out=out)
    for verdict in result["verdicts"]:  # on the same validation samples for all, by a rule fixed beforehand
        print(verdict["text"])
    print(f"{out / 'compare.csv'} has a row for every strategy, budget and seed; {out / 'compare.html'} shows them")


if __name__ == "__main__":  # the searches start worker processes, which import this file
    arguments = [*sys.argv[1:], *("runs/global_or_layerwise", "60")[len(sys.argv) - 1 :]]
    main(Path(arguments[0]), int(arguments[1]))
