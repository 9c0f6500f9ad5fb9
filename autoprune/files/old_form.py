"""Figures as version 0.1.0 wrote them, loss, metrics and recipe in one mapping, told apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FIDELITIES = ("kl", "mse", "cosine")
"""Losses to the dense outputs that there were; each stood under its name among the metrics, over one of that name."""
RECIPE = ("steps", "epochs", "learning_rate", "distillation")
INTERVAL = {"loss_low": "low", "loss_high": "high"}


@dataclass(frozen=True)
class Figures:
    """A loss with its name and interval, the task's metrics, and the recipe of a fine-tune; each may be empty."""

    loss: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


def apart(figures: Mapping[str, Any]) -> Figures:
    """One old mapping, told apart. A metric whose name the loss had taken is lost: its figure was overwritten."""
    loss = figures.get("loss")
    name = _loss_name(figures)
    recipe = {key: figures[key] for key in RECIPE if key in figures}
    own = {"loss", *INTERVAL, *recipe, *({name} if name in FIDELITIES else ())}
    interval = {new: figures[old] for old, new in INTERVAL.items() if old in figures}
    told = {} if loss is None else {"name": name, "loss": loss, **interval}
    return Figures(told, {k: v for k, v in figures.items() if k not in own}, recipe)


def finetuned(recipe: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The recipe as a point holds it: the proxy of the search, or the long course of the stage `finetune`."""
    return {"recipe": "course" if "epochs" in recipe else "proxy", **recipe, "seed": seed}


def _loss_name(figures: Mapping[str, Any]) -> str:
    loss = figures.get("loss")
    if loss is None:
        return ""
    named = [n for n in FIDELITIES if figures.get(n) == loss]
    taken = {"loss", *INTERVAL, *RECIPE}
    return next(iter([*named, *(n for n, v in figures.items() if n not in taken and abs(v) == abs(loss))]), "loss")
