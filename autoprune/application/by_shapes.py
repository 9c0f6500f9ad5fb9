"""A point onto weights without data: cut by shapes alone, with what a criterion says that looks at weights alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from autoprune import plugins
from autoprune.database.masking import Zeros, best
from autoprune.errors import InputError
from autoprune.front import Point
from autoprune.protocols import Criterion, WeightCriterion
from autoprune.structure import Structure
from autoprune.tracing.copies import copied
from autoprune.tracing.rounding import round_weights
from autoprune.tracing.slim import kept_positions, named_tensors, slim

NO_DATA: Any = None
"""The task of a criterion that looks at weights alone."""


def ranked(point: Point, model: nn.Module, structure: Structure, criterion: Criterion) -> dict[str, tuple[int, ...]]:
    """The atoms that a criterion which looks at weights alone would keep.

    Raises:
        InputError: it looks at more.
    """
    if not getattr(criterion, "weights_only", False):
        raise InputError(
            "the model has other weights than the policy was found on, so its atoms must be ranked anew, and that "
            f"needs data: give a task, or a criterion that looks at weights alone: {', '.join(_weights_only())}"
        )
    widths = point.policy.as_dict()
    narrow = [g for g in structure if g.narrows]
    scores = criterion(model, narrow, NO_DATA) if narrow else {}
    first = {name: score.argsort(descending=True, stable=True)[: widths[name]] for name, score in scores.items()}
    kept = {name: tuple(sorted(atoms.tolist())) for name, atoms in first.items()}
    return kept | {g.name: tuple(range(widths[g.name])) for g in structure if g.kind in ("block", "bits")}


def _weights_only() -> list[str]:
    """Criteria that ask nothing of a task."""
    return [n for n in plugins.names("criteria") if getattr(plugins.load("criteria", n), "weights_only", False)]


def sliced(
    point: Point, model: nn.Module, structure: Structure, keep: Mapping[str, tuple[int, ...]], criterion: Criterion
) -> nn.Module:
    """A copy of `model` with the atoms of `keep` alone, the zeros and bits of the point; a warning says what it lacks.

    Raises:
        InputError: the point has zeros, and the criterion looks at more than weights.
    """
    warnings.warn(
        "without a task autoprune.apply only slices: nothing is compensated or repaired; give task=... (or --task JOB)",
        stacklevel=4,
    )
    small, widths = copied(model), point.policy.as_dict()
    slim(small, structure, keep)
    _give_zeros(small, model, structure, widths, keep, criterion)
    round_weights(small, structure, widths)
    return small


def _give_zeros(
    small: nn.Module,
    model: nn.Module,
    structure: Structure,
    widths: Mapping[str, int],
    keep: Mapping[str, tuple[int, ...]],
    criterion: Criterion,
) -> None:
    """The zeros of a point by a criterion that looks at weights alone."""
    sparse = [g for g in structure if g.kind == "weight" and widths[g.name] < g.width]
    if not sparse:
        return
    if not (getattr(criterion, "weights_only", False) and isinstance(criterion, WeightCriterion)):
        free = [name for name in _weights_only() if hasattr(plugins.load("criteria", name), "weights")]
        raise InputError(
            "which weights stay was decided by data: give a task, or a criterion that looks at weights alone, which "
            f"gives other masks than the search had: {', '.join(free)}"
        )
    held = dict(small.named_parameters())
    scores = criterion.weights(model, [g.name for g in sparse if g.name in held], NO_DATA)
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    kept = kept_positions(structure, keep, {n: tuple(t.shape) for n, t in named_tensors(model).items()})
    sides = {str(op.weight): op.outputs for op in structure.ops}
    for group in (g for g in sparse if g.name in held):
        own = scores[group.name]
        for dim in range(len(shapes[group.name])):
            if (places := kept.get((group.name, dim))) is not None:
                own = own.index_select(dim, places.to(own.device))
        mask = best(own, Zeros.of(group, widths[group.name]), sides.get(group.name, 0))
        held[group.name].data.mul_(mask.to(held[group.name].device))
