"""A user's own `ray.tune.Tuner` drives the search: a trainable that evaluates policies, and the space to search.

    tuner = tune.Tuner(
        trainable(job),
        param_space=param_space(job),
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(metric=["loss", "macs"], mode=["min", "min"]), num_samples=100, reuse_actors=True
        ),
    )
    front = pareto_front(evaluations(tuner.fit()), ("macs",))

With `reuse_actors=True` an actor builds its evaluator once and then takes one trial after the other; without it every
trial starts a process of its own, which costs seconds each.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ray import tune

from autoprune.deploy import searched
from autoprune.errors import InputError, RunError
from autoprune.evaluation import Ask, Evaluation
from autoprune.families import analyze
from autoprune.files.job import Job
from autoprune.policy import Policy
from autoprune.protocols import EvaluatorFactory, Problem
from autoprune.record.folder import make_folder
from autoprune.run.prepare import prepare, settings_of
from autoprune.run.timed import runtime_step
from autoprune.samplers.optuna_bridge import TARGET, Knobs, knob

AnyJob = Job | str | Path | Mapping[str, Any]


def trainable(job: AnyJob, out: Path | None = None) -> type[tune.Trainable]:
    """A class for `tune.Tuner`: one trial evaluates one policy on the fitness samples, at the job's tier.

    It reports loss, all costs as ratios to dense (macs, params, bytes and the job's own), metrics where the evaluator
    has them (under `metrics` too, as one may be called loss), `policy` (the digest), `widths` and `tier`; `fitness:
    auto` means `refit`. A proposal is projected onto its target and the job's limits, so `widths`, not the positions in
    the config, say what was evaluated. A policy whose evaluation fails is a failed trial: search algorithms know what
    to do with those, and no penalty distorts their models.

    The level database is made here, once, in `out` (by default runs/<job's name>); it travels with data and model
    through Ray's object store, so the machines of a cluster need not share a folder. An actor takes what
    `executor.resources` says, by default one CPU.

    Raises:
        InputError: the job is wrong, or its budget out of reach.
    """
    job = as_job(job)
    folder = Path(out) if out is not None else Path("runs") / job.name
    make_folder(folder)
    setting = prepare(job, folder.resolve())
    made = tune.with_parameters(PolicyTrial, factory=setting.shipment(), problem=setting.problem)
    resourced: type[tune.Trainable] = tune.with_resources(made, job.executor.resources or {"cpu": 1})
    return resourced


def param_space(job: AnyJob, at: float | None = None) -> dict[str, Any]:
    """The space for `tune.Tuner`: a grid position for each group, so that order is kept, and a budget `target`.

    The target varies over the job's budget range, which suits a search for a whole front; with `at` it is fixed, which
    suits a search of one objective: that would otherwise only learn that more is better.

    Raises:
        InputError: the job is wrong, or `at` lies outside its budget range.
    """
    job = as_job(job)
    task, budget = job.build_task(), job.budget.plain()
    found = analyze(task.build(), task.example_inputs(), kinds=job.space.kinds)
    structure = searched(found, job.search_space(), job.deploy, runtime_step(job, settings_of(job).torch_device))
    if at is not None and not budget.low <= at <= budget.high:
        raise InputError(f"at must lie in the job's budget range [{budget.low:g}, {budget.high:g}], not {at}")
    space: dict[str, Any] = {knob(group.name): tune.randint(0, len(group.grid)) for group in structure.groups}
    return space | {TARGET: tune.uniform(budget.low, budget.high) if at is None else float(at)}


def evaluations(results: tune.ResultGrid) -> tuple[Evaluation, ...]:
    """What the trials found, as evaluations; failed trials are left out. `pareto_front` makes a front of them."""
    return tuple(_evaluation(r.metrics) for r in results if r.error is None and r.metrics and "widths" in r.metrics)


class PolicyTrial(tune.Trainable):  # type: ignore[misc]  # Ray has no types for it
    """One policy, evaluated; the evaluator stays for the actor's next trial."""

    def setup(self, config: Mapping[str, Any], factory: EvaluatorFactory, problem: Problem) -> None:
        torch.set_num_threads(1)  # an actor a core beats many threads
        self._knobs, self._tier, self._evaluate = Knobs(problem), problem.tier, factory()

    def step(self) -> dict[str, Any]:
        policy = self._knobs.policy(self.config)
        found = self._evaluate(Ask(policy, self._tier))
        if not found.ok:
            raise RunError(f"policy {policy.digest} failed: {found.error}")
        named = {"policy": policy.digest, "widths": policy.as_dict(), "tier": self._tier, "passes": found.passes}
        figures = {**found.metrics, **found.costs, "loss": found.loss}  # a metric may bear any of the other names
        parts = {"metrics": dict(found.metrics), "costs": dict(found.costs)}
        return {**figures, **named, **parts, "done": True}

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        return True  # `step` reads self.config, which Tune has replaced

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to keep: a trial is one step."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing was kept."""


def as_job(job: AnyJob) -> Job:
    """A job from its file, its values or itself."""
    if isinstance(job, Job):
        return job
    return Job.from_dict(job) if isinstance(job, Mapping) else Job.load(job)


def _evaluation(report: Mapping[str, Any]) -> Evaluation:
    ask = Ask(Policy.of(report["widths"]), report["tier"])
    costs, metrics = ({n: float(v) for n, v in report[part].items()} for part in ("costs", "metrics"))
    seconds = float(report.get("time_this_iter_s", 0.0))
    return Evaluation(ask, float(report["loss"]), costs, metrics, float(report["passes"]), seconds)
