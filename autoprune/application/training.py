"""What `apply` trains after the repair: nothing, what the search trained (`proxy`), or the job's recovery (`full`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from autoprune.errors import InputError, did_you_mean
from autoprune.front import Point

Finetune = Literal["none", "proxy", "full"]
RECIPES = ("proxy", "course")
"""What a point may have been trained by: the brief fine-tune of the search, or a course of the stage `finetune`."""


@dataclass(frozen=True)
class Training:
    """Which training follows the repair; `epochs` are those of `full`, None for the recovery's own number.

    `schedule` and `options` name the recovery of `full`, a file of autoprune/recovery; None is the job's, or one_shot.
    `checkpoints` is the folder where its trainings are kept, where no folder of a result stands beside which they could
    be.
    """

    kind: Finetune = "proxy"
    epochs: float | None = None
    schedule: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: Path | None = field(default=None, repr=False)  # what a result depends on is told by the repr

    @staticmethod
    def of(finetune: str | None, epochs: float | None, recovery: str | Mapping[str, Any] | None = None) -> Training:
        """From what a user says; epochs and a recovery imply `full`.

        Raises:
            InputError: an unknown word or key, or epochs or a recovery beside another word than `full`.
        """
        if isinstance(recovery, Mapping):
            return _of_mapping(Training.of(finetune, epochs, recovery.get("schedule", "one_shot")), recovery)
        words: dict[str, Finetune] = {word: word for word in get_args(Finetune)}
        if finetune is not None and not isinstance(finetune, str):
            raise InputError(f"finetune is a word: {', '.join(words)}, not {finetune!r}; epochs are finetune_epochs")
        if finetune is not None and finetune not in words:
            raise InputError(f"unknown finetune {finetune!r}; {did_you_mean(finetune, words)}")
        if epochs is None and recovery is None:
            return Training(words[finetune or "proxy"])
        if finetune not in (None, "full"):
            what = f"the recovery {recovery!r}" if epochs is None else "finetune epochs"
            raise InputError(
                f"{what} belong{'s' * (epochs is None)} to finetune full, not to {finetune}; leave one out"
            )
        if epochs is None:
            return Training("full", schedule=recovery)
        number = isinstance(epochs, int | float) and not isinstance(epochs, bool)
        if not (number and math.isfinite(epochs) and 0.0 <= epochs < 1e4):
            raise InputError(f"finetune epochs must be a number of epochs from 0 to 10000, not {epochs!r}")
        return Training("full", epochs, recovery)

    @property
    def recovery(self) -> str:
        """The recovery's name."""
        return self.schedule or "one_shot"


def _of_mapping(named: Training, recovery: Mapping[str, Any]) -> Training:
    """`named` with all that a recovery's mapping says."""
    known = ("schedule", "options", "checkpoints")
    if foreign := [key for key in recovery if key not in known]:
        raise InputError(f"recovery: unknown key {foreign[0]!r}; {did_you_mean(str(foreign[0]), known)}")
    options, folder = recovery.get("options", {}), recovery.get("checkpoints")
    if not isinstance(options, Mapping) or not isinstance(folder, str | Path | None):
        raise InputError("recovery: options must be a mapping and checkpoints a folder")
    return replace(named, options=dict(options), checkpoints=None if folder is None else Path(folder))


@dataclass(frozen=True)
class Recipe:
    """A recipe that a point stores, checked: files are data."""

    name: str
    steps: int
    seed: int
    facts: Mapping[str, Any]
    learning_rate: float | None = None


def stored_recipe(point: Point) -> Recipe | None:
    """What trained the point's `finetuned` figures; None where nothing did.

    Raises:
        InputError: a recipe that this version does not know, or figures that make none.
    """
    found = point.finetuned
    if not found:
        return None
    name, steps, seed = (found.get(key) for key in ("recipe", "steps", "seed"))
    if name not in RECIPES:
        raise InputError(
            f"point {point.id} was trained by the recipe {name!r}, which this version does not know; "
            "finetune none repairs only, full trains anew"
        )
    if not (isinstance(steps, int) and isinstance(seed, int) and steps >= 0):
        raise InputError(f"point {point.id}: its recipe needs whole steps and a seed, not {dict(found)}")
    rate = found.get("learning_rate") if name == "proxy" else None  # older files do not say
    if rate is not None and not (isinstance(rate, int | float) and 0.0 < rate <= 10.0):
        raise InputError(f"point {point.id}: the learning rate of its recipe must lie in (0, 10], not {rate!r}")
    return Recipe(name, steps, seed, found, None if rate is None else float(rate))


def promised(point: Point, training: Training) -> dict[str, Any] | None:
    """The figures of the front that the training aims at: before its fine-tune, or after.

    None where the front has none: at the tier `tune` nothing was scored before the fine-tune.
    """
    if training.kind == "none" and point.finetuned and point.base.space.get("tier") == "tune":
        return None
    tuned = training.kind != "none" and "finetuned" in point.losses
    return figures(point, "finetuned" if tuned else "validation")


def figures(point: Point, split: str) -> dict[str, Any]:
    """Loss and metrics of one split, in two name spaces."""
    loss = {k: v for k, v in point.losses[split].items() if k in ("name", "loss")}
    return {"loss": loss, "metrics": dict(point.metrics.get(split, {}))}
