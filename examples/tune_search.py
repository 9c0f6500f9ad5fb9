"""Your own Ray Tune drives the search. usage: python examples/tune_search.py [RUN_DIR] [TRIALS]."""

import logging
import sys
from pathlib import Path

import ray
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from autoprune.integrations.tune import evaluations, param_space, trainable
from autoprune.pareto import pareto_front

JOB = Path(__file__).parents[1] / "search_spaces" / "digits.yaml"


def main(run_dir: Path, trials: int) -> None:
    ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    search = OptunaSearch(metric=["loss", "macs"], mode=["min", "min"], seed=0)  # or any other search algorithm
    tuner = tune.Tuner(
        trainable(JOB, run_dir),  # the level database is made here, once
        param_space=param_space(JOB),
        tune_config=tune.TuneConfig(search_alg=search, num_samples=trials, reuse_actors=True),
        run_config=tune.RunConfig(
            storage_path=str((run_dir / "tune").resolve()),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a trial is one step
            verbose=0,
        ),
    )
    for e in pareto_front(evaluations(tuner.fit()), ("macs",)):
        print(f"{e.costs['macs']:.3f} of the MACs, KL {e.loss:.4f}: {e.ask.policy.as_dict()}")


if __name__ == "__main__":
    arguments = [*sys.argv[1:], *("runs/tune", "60")[len(sys.argv) - 1 :]]
    main(Path(arguments[0]), int(arguments[1]))
