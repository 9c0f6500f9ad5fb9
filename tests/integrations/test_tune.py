"""A user's own Tuner searches: on a real Ray, with Optuna's samplers of one and of several objectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from autoprune.allocation.budget import Projector
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.files.job import Job
from autoprune.integrations.tune import PolicyTrial, evaluations, param_space, trainable
from autoprune.pareto import pareto_front
from autoprune.run.prepare import prepare
from autoprune.samplers.optuna_bridge import Knobs
from tests.conftest import RAY

pytestmark = [
    RAY,
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

JOB: dict[str, Any] = {
    "task": {"name": "digits"},
    "budget": {"macs": [0.2, 0.9], "at": [0.6, 0.3], "params": 0.8},
    "evaluator": {"calibration": 64, "validation": 80, "fitness": "stitch"},
    "executor": {"kind": "inline"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


def fit(search: OptunaSearch, space: dict[str, Any], folder: Path, trials: int, made: Any = None) -> tune.ResultGrid:
    config = tune.TuneConfig(search_alg=search, num_samples=trials, reuse_actors=True, max_concurrent_trials=1)
    keep = tune.CheckpointConfig(checkpoint_at_end=False)
    run = tune.RunConfig(storage_path=str(folder / "tune"), verbose=0, checkpoint_config=keep)
    return tune.Tuner(made or trainable(JOB, folder), param_space=space, tune_config=config, run_config=run).fit()


def test_a_search_of_two_objectives_finds_a_front_within_the_budget_whose_losses_are_the_evaluators(
    folder: Path,
) -> None:
    results = fit(OptunaSearch(metric=["loss", "macs"], mode=["min", "min"], seed=0), param_space(JOB), folder, 8)
    found = evaluations(results)
    assert len(found) == 8
    assert not results.errors
    for result, evaluation in zip(results, found, strict=True):
        assert evaluation.costs["macs"] <= result.config["target"] + 1e-9
        assert evaluation.costs["params"] <= 0.8 + 1e-9
        assert result.metrics["policy"] == evaluation.ask.policy.digest
    front = pareto_front(found, ("macs",))
    assert front
    here = prepare(Job.from_dict(JOB), folder).evaluator_factory()
    assert here()(front[0].ask).loss == pytest.approx(front[0].loss, rel=1e-5)


def test_a_search_of_one_objective_stays_at_its_fixed_target(folder: Path) -> None:
    results = fit(OptunaSearch(metric="loss", mode="min", seed=0), param_space(JOB, at=0.5), folder, 4)
    found = evaluations(results)
    assert len(found) == 4
    assert all(0.4 < e.costs["macs"] <= 0.5 + 1e-9 for e in found)
    assert results.get_best_result("loss", "min").metrics["loss"] == min(e.loss for e in found)


def test_a_failed_evaluation_is_a_failed_trial_with_its_reason_and_the_search_goes_on(folder: Path) -> None:
    marker = folder / "failed"

    def evaluate(ask: Ask) -> Evaluation:
        if marker.exists():
            return Evaluation(ask, 0.5, {"macs": 0.3})
        marker.touch()
        return Evaluation.failed(ask, "the loss is nan")

    problem = prepare(Job.from_dict(JOB), folder).problem
    made = tune.with_parameters(PolicyTrial, factory=lambda: evaluate, problem=problem)
    results = fit(OptunaSearch(metric="loss", mode="min", seed=0), param_space(JOB, at=0.5), folder, 2, made)
    (error,) = results.errors
    assert "the loss is nan" in str(error)
    assert [e.loss for e in evaluations(results)] == [0.5]


def test_positions_are_projected_as_the_optuna_bridge_does(folder: Path) -> None:
    problem = prepare(Job.from_dict(JOB), folder).problem
    knobs = Knobs(problem)
    space = param_space(JOB)
    assert set(space) == {*knobs.last, "target"}
    assert {name: space[name].upper - 1 for name in knobs.last} == knobs.last
    policy = knobs.policy({**knobs.last, "target": 0.4})
    dense = np.ones(len(problem.structure))
    assert policy == Projector(problem.structure, problem.costs).project(dense, {"macs": 0.4, "params": 0.8})


def test_a_target_outside_the_budget_and_a_wrong_job_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"at must lie in the job's budget range \[0\.2, 0\.9\], not 0\.95"):
        param_space(JOB, at=0.95)
    with pytest.raises(InputError, match=r"budget macs=0\.0001 is out of reach"):
        trainable({**JOB, "budget": {"macs": [0.0001, 0.9]}}, folder)
    with pytest.raises(InputError, match="cannot read the job file"):
        trainable("nowhere.yaml", folder)
