"""The long fine-tuning of front points, without a word on who schedules it: points, recipes, courses, what is kept."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import qmc
from torch import Tensor

from autoprune.database.drawn import samples_in
from autoprune.errors import InputError
from autoprune.evaluation import Ask
from autoprune.evaluator.finetune import Course, Recipe, usual_rate
from autoprune.evaluator.material import BATCH_SIZE
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.files import old_form
from autoprune.files.job_parts import FinetunePart
from autoprune.files.whole import whole
from autoprune.front import Front, Point
from autoprune.policy import Policy
from autoprune.protocols import Budget, Task
from autoprune.tracing.wiring import batch_norms

WEIGHTS, STATE = "model.safetensors", "course.pt"


@dataclass(frozen=True)
class Attempt:
    """One recipe for one point of the front."""

    point: str
    epochs: int
    learning_rate: float
    distillation: float

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.learning_rate, self.distillation)

    def __str__(self) -> str:
        epochs = f"{self.epochs} epoch{'s' * (self.epochs > 1)}"
        return f"{self.point}, {epochs}, rate {self.learning_rate:.3g}, distillation {self.distillation:.2f}"


@dataclass(frozen=True)
class Plan:
    """What the stage does: `attempts` on the points' policies. `key` names it: the same key means the same work."""

    key: str
    policies: Mapping[str, Policy]
    attempts: tuple[Attempt, ...]


def planned(
    front: Front,
    section: FinetunePart,
    budget: Budget,
    task: Task,
    *,
    identity: Mapping[str, str],
    settings: Settings,
) -> Plan:
    """The stage for a front: its chosen points, each with its share of the recipes; points take turns.

    `identity` is what the search's evaluations depend on beside the job, `settings` are their evaluator's.
    """
    points = chosen_points(front, budget, section.points)
    rate = section.learning_rate or _usual_rates(task, settings.learning_rate)
    shares = [len(range(i, section.samples, len(points))) for i in range(len(points))]
    rows = [
        recipes(p.id, section, rate, n, (settings.seed, i)) for i, (p, n) in enumerate(zip(points, shares, strict=True))
    ]
    turns = [row[k] for k in range(max(shares)) for row in rows if k < len(row)]
    policies = {p.id: p.policy for p in points}
    depends = (section.model_dump(), identity, sorted(policies.items()), turns, settings)
    return Plan(hashlib.sha256(repr(depends).encode()).hexdigest()[:12], policies, tuple(turns))


def chosen_points(front: Front, budget: Budget, n: int) -> list[Point]:
    """The best point at each asked budget, dearest first, then always the point farthest in cost from those chosen."""
    chosen: list[Point] = []
    for at in sorted(budget.at, reverse=True):
        fitting = [p for p in front if p.ratio(budget.cost) <= at + 1e-9]
        best = min(fitting, key=_judged_loss, default=None)
        if best is not None and best not in chosen:
            chosen.append(best)
    rest = [p for p in front if p not in chosen]
    while rest and len(chosen) < n:
        taken = [c.ratio(budget.cost) for c in chosen]
        chosen.append(max(rest, key=partial(_distance, budget.cost, taken)))
        rest.remove(chosen[-1])
    return chosen[:n]


def recipes(
    point: str, section: FinetunePart, rate: tuple[float, float], n: int, seed: tuple[int, int]
) -> list[Attempt]:
    """`n` recipes for a point, a Latin hypercube over the three ranges; rates on a logarithmic scale."""
    unit = qmc.LatinHypercube(3, rng=np.random.default_rng(seed)).random(n)
    (few, many), (low, high), (little, much) = section.epochs, rate, section.distillation
    return [
        Attempt(
            point,
            min(many, few + int(u * (many - few + 1))),
            float(f"{low * (high / low) ** v:.4g}"),
            round(little + w * (much - little), 3),
        )
        for u, v, w in unit.tolist()
    ]


class Tuition:
    """The course of one attempt on the evaluator's resident model, an epoch at a time, from the repaired model on."""

    def __init__(self, evaluator: TieredEvaluator, policy: Policy, attempt: Attempt) -> None:
        self._evaluator, self._policy, self._attempt = evaluator, policy, attempt
        self._per_epoch = epoch_steps(evaluator)
        self._course: Course | None = None

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return 0 if self._course is None else self._course.done // self._per_epoch

    @property
    def done(self) -> bool:
        return self.epoch >= self._attempt.epochs

    def advance(self) -> float:
        """Train for one epoch; returns the loss on the held-back samples.

        Raises:
            ArithmeticError: a loss is not finite.
        """
        if self._course is None:
            self._evaluator.repaired(Ask(self._policy, "refit"))
            self._course = self._made()
        try:
            self._course.advance(self._per_epoch)
        finally:
            self._evaluator.stitcher.model.requires_grad_(False)
        loss = self._evaluator.standing("heldback").loss
        if not math.isfinite(loss):
            raise ArithmeticError(f"the held-back loss is {loss} after epoch {self.epoch}")
        return loss

    def save(self, folder: Path) -> None:
        """Weights, and the course as plain tensors and values."""
        weights, state = self.held()
        save_file(weights, folder / WEIGHTS)
        torch.save(state, folder / STATE)

    def load(self, folder: Path) -> None:
        """Go on where `save` stood."""
        self.go_on(load_file(folder / WEIGHTS), torch.load(folder / STATE, weights_only=True))

    def held(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights, and the state of the course, as they are now."""
        assert self._course is not None
        return _weights(self._evaluator), self._course.state_dict()

    def go_on(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on where they were held."""
        _fill(self._evaluator, self._policy, weights)
        self._course = self._made()
        self._course.load_state_dict(state)

    def _made(self) -> Course:
        e, steps = self._evaluator, self._attempt.epochs * self._per_epoch
        e.stitcher.mark_dirty()  # before the first step: whatever happens in it
        lesson, at_once = e.lesson(math.ceil(_n_train(e) / BATCH_SIZE)), e.samples.trained_at_once
        masks = dict(e.stitcher.masks)
        return Course(e.stitcher.model, lesson, steps, e.settings.seed, at_once, self._attempt.recipe, masks=masks)


def untrained(evaluator: TieredEvaluator, policy: Policy) -> float:
    """The held-back loss of the model that courses start from; it stays resident."""
    evaluator.repaired(Ask(policy, "refit"))
    return evaluator.standing("heldback").loss


def epoch_steps(evaluator: TieredEvaluator) -> int:
    """Optimizer steps of an epoch: its whole batches."""
    return max(1, _n_train(evaluator) // BATCH_SIZE)


def _n_train(evaluator: TieredEvaluator) -> int:
    return samples_in(evaluator.task.split("train"))


def load_weights(evaluator: TieredEvaluator, policy: Policy, folder: Path) -> None:
    """The resident model at `policy` with the weights that a Tuition saved."""
    _fill(evaluator, policy, load_file(folder / WEIGHTS))


def _fill(evaluator: TieredEvaluator, policy: Policy, weights: Mapping[str, Tensor]) -> None:
    model = evaluator.stitcher.stitch(policy)
    evaluator.stitcher.mark_dirty()
    model.load_state_dict(weights)


def keep_weights(evaluator: TieredEvaluator, path: Path) -> None:
    """The resident model's weights at `path`, whole or not at all."""
    with whole(path) as draft:
        save_file(_weights(evaluator), draft)


def merged(front: Front, found: Sequence[Mapping[str, Any]]) -> Front:
    """The front, each point with the figures of its fine-tune where that beats what the point has."""
    better = {row["point"]: row for row in found if row["better"]}
    points = []
    for p in front:
        if (row := better.get(p.id)) is not None:
            losses = {**p.losses, "finetuned": row["losses"]["validation"]}
            metrics = {**p.metrics, "finetuned": row["metrics"]["validation"]}
            p = replace(p, losses=losses, metrics=metrics, finetuned=row["recipe"])
        points.append(p)
    return replace(front, points=tuple(points))


def conclusion(
    point: Point, recipe: Mapping[str, Any], heldback: float, loss: Mapping[str, Any], metrics: Mapping[str, float]
) -> dict[str, Any]:
    """What finetune.json says about a point: its best recipe, its scores, and whether it is better than before.

    A recipe of no steps is a training that did not help: the weights are those of the repair.
    """
    before = "finetuned" if "finetuned" in point.losses else "validation"
    return {
        "point": point.id,
        "macs_ratio": point.ratio("macs"),
        "latency": point.ratio("latency") if "latency" in point.costs else None,
        "recipe": dict(recipe),
        "heldback_loss": heldback,
        "losses": {"before": dict(point.losses[before]), "validation": dict(loss)},
        "metrics": {"before": dict(point.metrics.get(before, {})), "validation": dict(metrics)},
        "helped": recipe["steps"] > 0,
        "better": recipe["steps"] > 0 and (before == "validation" or loss["loss"] < point.losses[before]["loss"]),
    }


def course_recipe(attempt: Attempt, steps: int, seed: int) -> dict[str, Any]:
    """What a point says of the course that trained it; `steps` of it were taken."""
    return {
        "recipe": "course",
        "steps": steps,
        **{k: v for k, v in asdict(attempt).items() if k != "point"},
        "seed": seed,
    }


def read_finished(path: Path, key: str) -> dict[str, Any] | None:
    """finetune.json where it holds the conclusion of this very plan."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise InputError(f"{path} is damaged; remove it to go on from the checkpoints") from None
    if not isinstance(found, dict) or found.get("key") != key:
        return None
    return {**found, "points": [_today(row, found.get("seed", 0)) for row in found["points"]]}


def _today(row: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A row of finetune.json in today's words; version 0.1.0 wrote losses among the metrics."""
    if "losses" in row:
        return dict(row)
    old = {name: old_form.apart(row[name]) for name in ("before", "validation")}
    told = {"losses": {n: f.loss for n, f in old.items()}, "metrics": {n: f.metrics for n, f in old.items()}}
    return {**row, **told, "recipe": old_form.finetuned(row["recipe"], seed)}


def _distance(cost: str, taken: Sequence[float], point: Point) -> float:
    return min((abs(point.ratio(cost) - t) for t in taken), default=0.0)


def _judged_loss(point: Point) -> float:
    """Validation loss, after the brief fine-tune where there was one."""
    return point.loss("finetuned" if "finetuned" in point.losses else "validation")


def _usual_rates(task: Task, found: float | None) -> tuple[float, float]:
    """Around the peak rate that the search found for its brief fine-tune, else around the usual one."""
    usual = usual_rate(bool(batch_norms(task.build()))) if found is None else found
    return usual / 5, usual * 2.5


def _weights(evaluator: TieredEvaluator) -> dict[str, Tensor]:
    return {k: v.contiguous().clone() for k, v in evaluator.stitcher.model.state_dict().items()}
