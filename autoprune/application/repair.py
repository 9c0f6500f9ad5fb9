"""A pruned model with the weights that its point had in the search: compensated, repaired, trained as asked."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from autoprune import plugins
from autoprune.application.bench import REPAIR, Bench, Kept
from autoprune.application.checkpoints import Place, Saved
from autoprune.application.courses import Attempt, Tuition, epoch_steps
from autoprune.application.recovering import recovering
from autoprune.application.training import Recipe, Training, figures, stored_recipe
from autoprune.database.batches import in_format
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Tier
from autoprune.evaluator.precision import Precision, Wanted
from autoprune.evaluator.prepared import prepared_model, prepared_parts
from autoprune.evaluator.settings import Repair, Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.front import Point
from autoprune.policy import Policy
from autoprune.protocols import Criterion, Step, Task, check_directions
from autoprune.recovery import build_recovery
from autoprune.structure import Structure
from autoprune.tracing.copies import copied
from autoprune.tracing.rounding import round_weights


@dataclass(frozen=True)
class Repaired:
    """The model, its kept atoms, its figures on validation and what trained it (recipe, steps, seed).

    `course` says how its training went: `before` are the figures that it started from. `masks` are the hashes of the
    masks of its weights; None where a recovery may have moved them.
    """

    model: nn.Module
    keep: Mapping[str, tuple[int, ...]]
    validation: Mapping[str, Any]
    recipe: Mapping[str, Any]
    course: Mapping[str, Any] = field(default_factory=dict)
    masks: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Manner:
    """How a point is applied: with the settings of the search, the criterion that ranks anew, and which training.

    A full recovery is kept in `place` while it runs; `analysis` is a folder that may keep the one of a search.
    """

    settings: Settings
    criterion: Criterion
    training: Training
    place: Place | None = None
    analysis: Path | None = None


def repairing(
    point: Point,
    model: nn.Module,
    structure: Structure,
    task: Task,
    manner: Manner,
    keep: Mapping[str, Sequence[int]] | None,
) -> Generator[Step, None, Repaired]:
    """Cut, compensate, repair and train a copy of `model`; `keep` are the atoms to replay, None ranks them anew."""
    settings, training = manner.settings, manner.training
    yield Step("data")
    dense = prepared_model(task, settings.torch_device, copied(model))
    parts = prepared_parts(task, settings, dense)
    recipe = stored_recipe(point) if training.kind == "proxy" else None
    as_searched = replace(
        settings,
        finetune_steps=recipe.steps if recipe is not None else settings.finetune_steps,
        seed=recipe.seed if recipe is not None else settings.seed,
        learning_rate=None if recipe is None else recipe.learning_rate,
        precision=precision_of(point, settings),
        costs=(),  # the point tells its own; a latency would want its table
    )
    bench = Bench(task, structure, as_searched, manner.criterion, dense, parts, plain_tier(point))
    if training.kind == "full":
        _check_recovery(training, bench, point.policy)
    evaluator = yield from bench.evaluator(dense, structure, keep)
    kept: Kept = bench.kept(evaluator, point.policy)
    name = point.losses.get("validation", {}).get("name", settings.objective)
    if training.kind == "full":
        found = yield from recovering(evaluator, bench, point.policy, kept, training, manner.place)
        kept, told, trained, course = found.keep, found.recipe, found.model, dict(found.course)
        if before := course.get("before"):
            course["before"] = {**before, "loss": {"name": name, "loss": before["loss"]}}
    else:
        told = yield from _trained(evaluator, point.policy, bench.tier, recipe, manner.place)
        trained = evaluator.stitcher.model
        course = {"before": figures(point, "validation")} if _tuned(point, told) else {}
    yield Step("scores")
    round_weights(trained, structure, point.policy.as_dict())  # a recovery of a user's own may train in float32
    score = evaluator.standing_of(trained, "validation")
    return Repaired(
        in_format(copied(trained), torch.contiguous_format).to(next(model.parameters()).device),
        {name: tuple(atoms) for name, atoms in kept.items()},
        {"loss": {"name": name, "loss": score.loss}, "metrics": dict(score.metrics)},
        told,
        course,
        None if training.kind == "full" else evaluator.stitcher.mask_digests(),
    )


def _check_recovery(training: Training, bench: Bench, policy: Policy) -> None:
    """InputError where the recovery cannot do with this model what its options say, before any work."""
    recovery = build_recovery(training.recovery, training.options)
    recovery.check_policy(bench.structure, policy)
    course = recovery.course
    if course is not None:
        small = bench.bare({name: range(width) for name, width in policy.widths})
        course.check(bench.dense, small, bench.task)


def _tuned(point: Point, told: Mapping[str, Any]) -> bool:
    """Whether the front has the figures that its fine-tune started from: at the tier `tune` it has none."""
    return bool(told) and point.base.space.get("tier") != "tune"


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


def _trained(
    evaluator: TieredEvaluator, policy: Policy, tier: Tier, recipe: Recipe | None, place: Place | None
) -> Generator[Step, None, Mapping[str, Any]]:
    """Repair the resident model and train it as the search did: what trained it, nothing where nothing did."""
    yield Step(REPAIR)
    if recipe is None:
        evaluator.repaired(Ask(policy, tier))
        return {}
    if recipe.name == "course":
        yield from _taken(evaluator, policy, recipe, place)
    else:
        yield Step("training")
        evaluator.repaired(Ask(policy, "tune"))
    return dict(recipe.facts)


def _taken(
    evaluator: TieredEvaluator, policy: Policy, recipe: Recipe, place: Place | None
) -> Generator[Step, None, None]:
    """As much of a course of the stage `finetune` as its point took; kept in `place` after every epoch."""
    try:
        rate, weight = float(recipe.facts["learning_rate"]), float(recipe.facts["distillation"])
        attempt = Attempt("", int(recipe.facts["epochs"]), rate, weight)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"a course needs epochs, learning_rate and distillation, not {dict(recipe.facts)}") from None
    course, each = Tuition(evaluator, policy, attempt), epoch_steps(evaluator)
    if place is not None and (found := place.found()) is not None:
        course.go_on(found.tensors["model"], found.state)
    while not course.done and course.epoch * each < recipe.steps:
        yield Step("training", course.epoch * each, recipe.steps, "steps", 0.0)
        course.advance()
        if place is not None:
            weights, state = course.held()
            place.keep(Saved({"epoch": course.epoch}, {"model": weights}, state))


def precision_of(point: Point, settings: Settings) -> Wanted:
    """That of the search where the settings leave it open: atoms and repairs were judged in it."""
    found = point.base.space.get("precision")  # older files do not say, newer ones may know more of them
    known = {name: name for name in get_args(Precision)}
    return known.get(found, "auto") if settings.precision == "auto" else settings.precision
