"""`loss: auto`: which loss fits a task's outputs, by their shape and the targets beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

TARGET_NAMES = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Choice:
    """A loss by name, the axis of the outputs along which it finds the classes, and why."""

    name: str
    classes: int
    why: str


def choose(outputs: Tensor, targets: Any = None, classes: int | None = None) -> Choice:
    """The loss for `outputs`, dense ones of a whole batch with the samples in dimension 0, and its class axis.

    The axis is `classes` where the task states it; else the one axis whose removal leaves the shape of integer targets;
    else 1 for [N, C, spatial...] of four dimensions or more, and -1 for others. Then, the first that holds:

    - one value a sample or position: `bernoulli_kl` if the targets are yes or no (one logit), `mse` if they are not or
      are not known;
    - the task states `classes`, or integer targets have the shape without that axis (class numbers), or the targets
      have the outputs' shape and sum to one along it (class probabilities): `kl`;
    - targets of the outputs' shape that are yes or no (several labels at once): `bernoulli_kl`;
    - other targets in floats: `mse`;
    - nothing known of the targets, or integers of another shape: `kl`, as classes are what most models give.

    Targets are yes or no if they are 0 and 1, or lie in [0, 1] while most outputs do not: logits of soft labels, where
    a regression would stay among its targets. Targets are `batch[1]` of a pair, or what a dict batch calls labels or
    targets. `mse` is relative to the outputs' variance.
    """
    leaves = [t for t in tree_leaves(targets) if isinstance(t, Tensor)]
    axis = _axis(outputs, leaves, classes)
    seen = f"outputs {list(outputs.shape)}"
    numbers = [t for t in leaves if _is_number_of(t, outputs, axis)]
    alike = [t for t in leaves if t.dim() and t.numel() == outputs.numel() and len(t) == len(outputs)]
    if outputs.dim() < 2 or outputs.shape[axis] == 1:
        if alike and all(_is_yes_or_no(t, outputs) for t in alike):
            return Choice("bernoulli_kl", axis, f"{seen} are one logit each: the targets are yes or no")
        return Choice("mse", axis, f"{seen} are one value each and the targets {_said(leaves)}")
    along = f"along axis {axis}"
    if classes is not None:
        return Choice("kl", axis, f"the task states that the classes of its {seen} lie {along}")
    if numbers and not any(t.is_floating_point() for t in alike):
        return Choice("kl", axis, f"{seen} have {outputs.shape[axis]} classes {along}: the targets are class numbers")
    if alike and all(_in_unit(t) and _sums_to_one(t.reshape(outputs.shape), axis) for t in alike):
        return Choice("kl", axis, f"the targets of {seen} are class probabilities {along}")
    if alike and all(_is_yes_or_no(t, outputs) for t in alike):
        return Choice("bernoulli_kl", axis, f"{seen} are several labels at once: targets of that shape are yes or no")
    if any(t.is_floating_point() for t in leaves) or alike:
        return Choice("mse", axis, f"{seen} are values: the targets {_said(leaves)}")
    return Choice("kl", axis, f"{seen} are taken for classes {along}: the targets {_said(leaves)}")


def class_axis(outputs: Tensor, stated: int | None = None) -> int:
    """The stated axis, else 1 for [N, C, spatial...] and -1 for others."""
    return stated if stated is not None else 1 if outputs.dim() >= 4 else -1


def targets_of(batch: Any) -> Any:
    """The targets of a batch that is a pair, or that names them; else None."""
    if isinstance(batch, Mapping):
        return next((batch[name] for name in TARGET_NAMES if name in batch), None)
    return batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None


def _axis(outputs: Tensor, leaves: list[Tensor], stated: int | None) -> int:
    usual = class_axis(outputs, stated)
    if stated is not None or outputs.dim() < 3:
        return usual
    fitting = [a for a in (usual, 1, -1) if any(_is_number_of(t, outputs, a) for t in leaves)]
    return fitting[0] if fitting else usual


def _is_number_of(targets: Tensor, outputs: Tensor, axis: int) -> bool:
    """Whether `targets` are integers, one for each position of the outputs without the class axis."""
    rest = list(outputs.shape)
    del rest[axis]
    whole = not targets.is_floating_point() and not targets.is_complex() and targets.dtype != torch.bool
    return whole and [n for n in targets.shape if n > 1] == [n for n in rest if n > 1]


def _is_yes_or_no(targets: Tensor, outputs: Tensor) -> bool:
    if not _in_unit(targets):
        return False
    hard = bool(((targets == 0) | (targets == 1)).all())
    return hard or float(((outputs < 0) | (outputs > 1)).float().mean()) > 0.5


def _in_unit(targets: Tensor) -> bool:
    return targets.numel() > 0 and bool(((targets >= 0) & (targets <= 1)).all())


def _sums_to_one(targets: Tensor, axis: int) -> bool:
    return bool(((targets.double().sum(axis) - 1.0).abs() < 1e-4).all())


def _said(leaves: list[Tensor]) -> str:
    if not leaves:
        return "are not known"
    return "are " + " and ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in leaves[:2])
