"""Search digits from Python and look at the front. usage: python examples/quickstart.py [RUN_DIR [KEY=VALUE ...]]."""

import sys
from pathlib import Path

import autoprune

JOB = Path(__file__).parents[1] / "search_spaces" / "digits.yaml"


def main(run_dir: Path, *changes: str) -> None:
    job = autoprune.Job.load(JOB, changes)
    run = autoprune.search(job, out=run_dir)  # calling it again with the same folder resumes
    for evaluation in run:  # progress, early stop and logging are yours: this is an ordinary loop
        if run.done % 20 == 0:
            print(f"{run.stage} {run.done}/{run.total}: loss {evaluation.loss:.4f} at {evaluation.costs['macs']:.2f}")
    for point in run.front:
        loss, accuracy = point.losses["validation"], point.metrics["validation"]["accuracy"]
        macs = point.ratio("macs")
        print(f"{point.id}: {macs:.3f} of the MACs, {loss['name']} {loss['loss']:.4f}, accuracy {accuracy:.3f}")


if __name__ == "__main__":  # the search starts worker processes, which import this file
    run_dir, *changes = sys.argv[1:] or ["runs/quickstart"]
    main(Path(run_dir), *(changes or ["search.trials=60"]))
