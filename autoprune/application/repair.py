"""A pruned model with the weights that its point had in the search: compensated, repaired, trained as asked."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from autoprune import plugins
from autoprune.application.courses import Attempt, Tuition, epoch_steps
from autoprune.application.starting import Bench, Kept, started
from autoprune.application.training import Recipe, Training, stored_recipe
from autoprune.database.batches import StatisticsOnly, in_format
from autoprune.database.build import build_database
from autoprune.database.drawn import samples_in
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Tier
from autoprune.evaluator.keep_best import restore
from autoprune.evaluator.material import BATCH_SIZE
from autoprune.evaluator.precision import Precision
from autoprune.evaluator.prepared import prepared_model, prepared_parts
from autoprune.evaluator.settings import Repair, Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.front import Point
from autoprune.policy import Policy
from autoprune.protocols import Criterion, Task, check_directions
from autoprune.recovery import build_recovery
from autoprune.structure import Structure
from autoprune.tracing.copies import copied

FULL_EPOCHS = 10.0


@dataclass(frozen=True)
class Repaired:
    """The model, its kept atoms, its figures on validation and what trained it (recipe, steps, seed)."""

    model: nn.Module
    keep: Mapping[str, tuple[int, ...]]
    validation: Mapping[str, Any]
    recipe: Mapping[str, Any]


def repaired(
    point: Point,
    model: nn.Module,
    structure: Structure,
    task: Task,
    settings: Settings,
    criterion: Criterion,
    *,
    keep: Mapping[str, Sequence[int]] | None,
    training: Training,
) -> Repaired:
    """Cut, compensate, repair and train a copy of `model`; `keep` are the atoms to replay, None ranks them anew."""
    dense = prepared_model(task, settings.torch_device, copied(model))
    parts = prepared_parts(task, settings, dense)
    seen = StatisticsOnly(task, parts.statistics, min(settings.batch_size, parts.fits))
    database = build_database(dense, structure, seen, criterion, keep)
    recipe = stored_recipe(point) if training.kind == "proxy" else None
    as_searched = replace(
        settings,
        finetune_steps=recipe.steps if recipe is not None else settings.finetune_steps,
        seed=recipe.seed if recipe is not None else settings.seed,
        learning_rate=None if recipe is None else recipe.learning_rate,
        precision=precision_of(point, settings),
        costs=(),  # the point tells its own; a latency would want its table
    )
    evaluator = TieredEvaluator(task, structure, database, as_searched, dense, parts=parts)
    kept: Kept = {n: tuple(database.keep(n, w).tolist()) for n, w in point.policy.widths}
    tier = plain_tier(point)
    if training.kind == "full":
        bench = Bench(task, structure, as_searched, criterion, dense, parts, tier)
        kept, told = _recovered(evaluator, bench, point.policy, kept, training)
    else:
        told = _trained(evaluator, point.policy, tier, recipe)
    score = evaluator.standing("validation")
    small = in_format(copied(evaluator.stitcher.model), torch.contiguous_format)
    loss = {"name": point.losses.get("validation", {}).get("name", settings.objective), "loss": score.loss}
    return Repaired(
        small.to(next(model.parameters()).device),
        {name: tuple(atoms) for name, atoms in kept.items()},
        {"loss": loss, "metrics": dict(score.metrics)},
        told,
    )


def searched_settings(point: Point, own: Settings) -> Settings:
    """The settings of the search as far as the point knows them, `own` for the rest: the figures are to be the same."""
    space = point.base.space
    minimised = point.losses.get("validation", {}).get("name")
    loss, ways = space.get("loss", minimised), check_directions(point.base.directions)
    metric = space.get("metric", minimised if minimised in ways and minimised != loss else own.metric)
    return replace(
        own,
        loss=loss if loss in plugins.names("losses") else own.loss,
        metric=metric,
        direction=None if metric is None else ways.get(metric, own.direction),
        calibration=int(space.get("calibration", own.calibration)),
        validation=int(space.get("validation", own.validation)),
        repair=space["repair"] if space.get("repair") in get_args(Repair) else own.repair,
    )


def plain_tier(point: Point) -> Tier:
    """How the search repaired, without its training."""
    tier: Tier = point.base.space.get("tier", "refit")
    return "refit" if tier == "tune" else tier


def _trained(evaluator: TieredEvaluator, policy: Policy, tier: Tier, recipe: Recipe | None) -> Mapping[str, Any]:
    """Repair the resident model and train it as the search did: what trained it, nothing where nothing did."""
    if recipe is None:
        evaluator.repaired(Ask(policy, tier))
        return {}
    if recipe.name == "course":
        _taken(evaluator, policy, recipe)
    else:
        evaluator.repaired(Ask(policy, "tune"))
    return dict(recipe.facts)


def _taken(evaluator: TieredEvaluator, policy: Policy, recipe: Recipe) -> None:
    """As much of a course of the stage `finetune` as its point took."""
    try:
        rate, weight = float(recipe.facts["learning_rate"]), float(recipe.facts["distillation"])
        attempt = Attempt("", int(recipe.facts["epochs"]), rate, weight)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"a course needs epochs, learning_rate and distillation, not {dict(recipe.facts)}") from None
    course = Tuition(evaluator, policy, attempt)
    while not course.done and course.epoch * epoch_steps(evaluator) < recipe.steps:
        course.advance()


def _recovered(
    evaluator: TieredEvaluator, bench: Bench, policy: Policy, kept: Kept, training: Training
) -> tuple[Kept, Mapping[str, Any]]:
    """The full recovery on the resident model, the best weights of its last training: what is kept, what trained it."""
    evaluator.repaired(Ask(policy, bench.tier))
    epochs = FULL_EPOCHS if training.epochs is None else training.epochs
    if epochs == 0.0:
        return kept, {}
    steps, seed = max(1, round(epochs * samples_in(evaluator.task.split("train")) / BATCH_SIZE)), bench.settings.seed
    options = dict(training.options)
    if "learning_rate" in inspect.signature(plugins.load("recovery", training.recovery)).parameters:
        options.setdefault("learning_rate", evaluator.found_rate(steps))
    recovery = build_recovery(training.recovery, options)
    start = started(recovery, bench, policy, kept, steps, seed)
    last = steps if start is None else start.steps
    if start is not None:
        kept = start.keep
        restore(evaluator.repaired(Ask(policy, "stitch")), start.weights)
    result = evaluator.recovered(recovery, last)
    if not result.helped:
        before = "as repaired" if start is None else f"as {training.recovery} left it before them"
        warnings.warn(f"{last} steps of training did not make the model better, so it is {before}", stacklevel=5)
    told = {"recipe": "full", "schedule": training.recovery, "steps": steps, "epochs": epochs, "seed": seed}
    return kept, {**told, "helped": result.helped}


def precision_of(point: Point, settings: Settings) -> Literal["auto", "fp32", "bf16"]:
    """That of the search where the settings leave it open: atoms and repairs were judged in it."""
    found = point.base.space.get("precision")  # older files do not say, newer ones may know more of them
    known = {name: name for name in get_args(Precision)}
    return known.get(found, "auto") if settings.precision == "auto" else settings.precision
