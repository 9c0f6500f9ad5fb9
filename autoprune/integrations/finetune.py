"""The finalists' long fine-tuning as a `ray.tune.Tuner`: ASHA over recipes, checkpoints, resumed by `Tuner.restore`."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from autoprune.application.courses import (
    Attempt,
    Plan,
    Tuition,
    conclusion,
    course_recipe,
    epoch_steps,
    keep_weights,
    load_weights,
    merged,
    planned,
    read_finished,
    untrained,
)
from autoprune.errors import InputError, RunError, one_line
from autoprune.evaluation import Ask, Evaluation
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.executors._ray_cluster import connect
from autoprune.files.job_parts import ExecutorPart
from autoprune.files.policy_file import save_csv, save_front
from autoprune.files.whole import write_whole
from autoprune.policy import Policy
from autoprune.protocols import EvaluatorFactory
from autoprune.record.folder import write_event
from autoprune.record.lock import locked
from autoprune.run.exported import told_loss
from autoprune.run.run import Run

Say = Callable[[str], None]
_ALOUD: ContextVar[Say] = ContextVar("_ALOUD")
SUMMARY, EXPERIMENTS, WEIGHTS = "finetune.json", "tune", "finetuned"
ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a task that opens files by relative paths finds them
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # files for other viewers, written at every epoch
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C must interrupt us, as everywhere
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # else a kill forgets the last ten seconds of trials
}
"""Defaults; what the user's environment says comes first."""


def finetune_front(run: Run, say: Say = lambda line: None) -> tuple[Mapping[str, Any], ...]:
    """Fine-tune points of a finished run as its job's `finetune` section says; one row for each point.

    A trial trains one point with one recipe, an epoch at a time, and reports its loss on the held-back samples; ASHA
    stops those that fall behind the point's other recipes at the same share of their schedules. Each point's best
    recipe (or the model as it was repaired, where no epoch of any made it better) is scored on validation, its weights
    go to RUN_DIR/finetuned/<point>.safetensors, the summary to finetune.json, and policy.json takes the metrics where
    they are better (`load_front` reads them; `run.front` stays as the search left it). Killed at any moment the same
    call goes on; finished, nothing is repeated. Which recipe is stopped early depends on the order in which trials
    finish.

    Ray is the cluster of `executor.address` with `executor.kind: ray`, else one in this machine, with
    `executor.workers` CPUs; one that is up already is used. Experiments lie in RUN_DIR/tune, which the machines of a
    cluster must share.

    Raises:
        InputError: the job has no `finetune` section, or a task from Python, which cannot travel to other processes.
        RunError: every trial failed.
    """
    section, setting, front = run.setting.job.finetune, run.setting, run.front
    if section is None:
        raise InputError("the job has no finetune section; it may be as short as finetune: {points: 2}")
    if setting.lent is not None:
        raise InputError("finetune needs a task that the job names (task.factory), not one lent from Python")
    with locked(run.path):
        plan = planned(
            front, section, setting.problem.budget, setting.task, identity=setting.identity, settings=setting.settings
        )
        found = read_finished(run.path / SUMMARY, plan.key)
        if found is None:
            found = _concluded(run, plan, _tuned(run, plan, say))
            write_whole(run.path / SUMMARY, json.dumps(found, indent=1))
            write_event(run.path, "finetune", {"points": found["points"]})
        better = merged(front, found["points"])
        save_front(better, run.path / "policy.json")
        save_csv(better, run.path / "front.csv")

    from autoprune.report import build_report

    build_report(run.path)
    return tuple(found["points"])


class FinetuneTrial(tune.Trainable):  # type: ignore[misc]  # Ray has no types for it
    """One step is one epoch; the evaluator stays for the actor's next trial."""

    def setup(self, config: Mapping[str, Any], factory: EvaluatorFactory, policies: Mapping[str, Policy]) -> None:
        torch.set_num_threads(1)  # an actor a core beats many threads
        self._evaluator, self._policies = factory(), policies
        self.reset_config(config)

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        assert isinstance(self._evaluator, TieredEvaluator)
        self._attempt = Attempt(**new_config["trial"])
        self._tuition = Tuition(self._evaluator, self._policies[self._attempt.point], self._attempt)
        return True

    def step(self) -> dict[str, Any]:
        loss, t = self._tuition.advance(), self._tuition
        return {"loss": loss, "epoch": t.epoch, "progress": 100.0 * t.epoch / self._attempt.epochs, "done": t.done}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        self._tuition.save(Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: Any) -> None:
        self._tuition.load(Path(checkpoint))


class ByPoint(FIFOScheduler):  # type: ignore[misc]  # Ray has no types for it
    """ASHA (Li et al. 2020) among the recipes of one point: losses of points of different cost do not compare.

    Nor do epochs of schedules of different length, so its time is the share of the schedule that is done, in percent.
    """

    def __init__(self) -> None:
        super().__init__()
        self._metric, self._of_point = "loss", dict[str, ASHAScheduler]()

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._asha(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = self._asha(trial).on_trial_result(tune_controller, trial, result)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._asha(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._asha(trial).on_trial_remove(tune_controller, trial)

    def _asha(self, trial: Any) -> Any:
        point = trial.config["trial"]["point"]
        if point not in self._of_point:
            how = {"time_attr": "progress", "max_t": 100, "grace_period": 25, "reduction_factor": 2}
            self._of_point[point] = ASHAScheduler(metric="loss", mode="min", **how)
        return self._of_point[point]


class Progress(tune.Callback):  # type: ignore[misc]  # Ray has no types for it
    """A line for every trial that ends. It holds nothing, as Tune pickles it with the experiment."""

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        last = trial.last_result
        self._line(trials, trial, f"held-back loss {last['loss']:.4g} after epoch {last['epoch']}")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._line(trials, trial, "failed")

    def _line(self, trials: Any, trial: Any, what: str) -> None:
        ended = 1 + sum(t.is_finished() for t in trials if t is not trial)
        _ALOUD.get()(f"fine-tuning {ended}/{len(trials)}: {Attempt(**trial.config['trial'])}: {what}")


def _aloud(say: Say) -> Say:
    """`say` past the silence that Tune is held to."""
    out = sys.stdout

    def speak(line: str) -> None:
        with contextlib.redirect_stdout(out):
            say(line)

    return speak


def _tuned(run: Run, plan: Plan, say: Say) -> Any:
    """The trials' results, from a new experiment or the one that was cut short."""
    job, folder = run.setting.job, (run.path / EXPERIMENTS).resolve()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    made = tune.with_parameters(FinetuneTrial, factory=run.setting.evaluator_factory(), policies=dict(plan.policies))
    made = tune.with_resources(made, job.executor.resources or {"cpu": 1})
    _ALOUD.set(_aloud(say))
    with _cluster(job.executor), _silent():
        experiment, there = _experiment(plan, folder), folder / plan.key
        # a kill in the first second leaves a Tuner without any state, which it takes for one that can be restored
        if tune.Tuner.can_restore(str(there)) and any(there.glob("experiment_state-*.json")):
            space = experiment["param_space"]
            tuner = tune.Tuner.restore(str(there), made, restart_errored=True, param_space=space)
        else:
            tuner = tune.Tuner(made, **experiment)
        results = tuner.fit()
    if all(not r.best_checkpoints for r in results):
        reasons = [_reason(r.error) for r in results if r.error is not None]
        raise RunError(f"all {len(plan.attempts)} fine-tuning trials failed; the first: {(reasons or ['unknown'])[0]}")
    return results


def _experiment(plan: Plan, folder: Path) -> dict[str, Any]:
    kept = tune.CheckpointConfig(
        num_to_keep=1, checkpoint_score_attribute="loss", checkpoint_score_order="min", checkpoint_frequency=1
    )
    return {
        "param_space": {"trial": tune.grid_search([asdict(attempt) for attempt in plan.attempts])},
        "tune_config": tune.TuneConfig(scheduler=ByPoint(), reuse_actors=True, trial_dirname_creator=_folder_name),
        "run_config": tune.RunConfig(
            name=plan.key,
            storage_path=str(folder),
            checkpoint_config=kept,
            callbacks=[Progress()],
            verbose=0,
        ),
    }


def _folder_name(trial: Any) -> str:
    return f"{trial.config['trial']['point']}-{trial.trial_id}"


def _concluded(run: Run, plan: Plan, results: Any) -> dict[str, Any]:
    """Each point's best recipe, scored on validation, its weights kept; and what became of every trial."""
    evaluator = run.setting.evaluator_factory()()
    assert isinstance(evaluator, TieredEvaluator)
    rows = []
    for point in run.front:
        best = min(_checkpoints(results, point.id), key=lambda found: float(found[2]["loss"]), default=None)
        if best is None:
            continue  # not chosen, or every recipe failed, and finetune.json says why
        attempt, checkpoint, report = best
        heldback = untrained(evaluator, point.policy)
        helped = float(report["loss"]) < heldback
        if helped:
            heldback = float(report["loss"])
            with checkpoint.as_directory() as folder:
                load_weights(evaluator, point.policy, Path(folder))
        found = _validated(evaluator, point.policy)
        keep_weights(evaluator, run.path / WEIGHTS / f"{point.id}.safetensors")
        steps = int(report["epoch"]) * epoch_steps(evaluator) if helped else 0
        recipe = course_recipe(attempt, steps, evaluator.settings.seed)
        loss = told_loss(found, evaluator.settings.objective)
        rows.append(conclusion(point, recipe, heldback, loss, found.metrics))
    return {"key": plan.key, "points": rows, "trials": [_record(r) for r in results]}


def _validated(evaluator: TieredEvaluator, policy: Policy) -> Evaluation:
    score = evaluator.standing("validation")
    ask = Ask(policy, "tune", split="validation")
    return Evaluation(ask, score.loss, {}, score.metrics, sample_losses=score.single)


def _checkpoints(results: Any, point: str) -> Iterator[tuple[Attempt, Any, Mapping[str, Any]]]:
    for result in results:
        attempt = Attempt(**result.config["trial"])
        if attempt.point == point:
            yield from ((attempt, checkpoint, report) for checkpoint, report in result.best_checkpoints)


def _record(result: Any) -> dict[str, Any]:
    """A trial in finetune.json."""
    report = result.metrics or {}
    done = {key: report[key] for key in ("epoch", "loss") if key in report}
    failed = {} if result.error is None else {"error": _reason(result.error)}
    return {**result.config["trial"], **done, **failed}


def _reason(error: BaseException) -> str:
    """The last line of what Ray tells about a failed trial: the exception itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else one_line(error)


@contextlib.contextmanager
def _cluster(part: ExecutorPart) -> Iterator[None]:
    """Ray as the executor section wants it, or as it is up already."""
    if ray.is_initialized():
        yield
        return
    if part.kind == "ray":
        connect(part.address or "auto", part.runtime_env)
    else:
        connect("local", cores=part.n_workers)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Inside, Tune prints nothing, and logs no failed trial with its traceback: finetune.json names the reason."""
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
