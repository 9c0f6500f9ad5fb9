"""Does layer-wise pruning beat global? usage: python examples/global_or_layerwise.py [OUT_DIR [KEY=VALUE ...]]."""

import sys
from pathlib import Path

import autoprune

JOB = Path(__file__).parents[1] / "search_spaces" / "digits.yaml"
NOT_LAYERWISE = ("uniform", "global")  # one ratio for all layers; one threshold over all their scores
LAYERWISE = ("knapsack", "evolution")  # solved from the sensitivity table; searched from there on


def main(out: Path, *changes: str) -> None:
    job = autoprune.Job.load(JOB, changes)
    result = autoprune.compare(job, (*NOT_LAYERWISE, *LAYERWISE), budgets=(0.5, 0.3), seeds=2, out=out)
    for verdict in result["verdicts"]:  # on the same validation samples for all, by a rule fixed beforehand
        print(verdict["text"])
    print(f"{out / 'compare.csv'} has a row for every strategy, budget and seed; {out / 'compare.html'} shows them")


if __name__ == "__main__":  # the searches start worker processes, which import this file
    out, *changes = sys.argv[1:] or ["runs/global_or_layerwise"]
    main(Path(out), *(changes or ["search.trials=60"]))
