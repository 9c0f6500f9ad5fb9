"""Whether a policy's groups are this model's: the Structure to cut by, or a named diff."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from autoprune.errors import InputError
from autoprune.front import Base, Point
from autoprune.run.kept_analysis import found_analysis
from autoprune.structure import Group, Structure
from autoprune.tracing.copies import unwrapped
from autoprune.tracing.declared import declared, dense_shapes, misfits, named, wider
from autoprune.tracing.inputs import described
from autoprune.tracing.ops import with_groups
from autoprune.tracing.slim import named_tensors, removed_positions


def matching(
    point: Point, model: nn.Module, example: Any, analysis: Path | None = None, otherwise: str = ""
) -> Structure:
    """The point's own groups on `model`, certified there, with two widths each: the point's and the dense one.

    What today's analysis would find does not matter, so that a policy file outlives changes of it. Where the folder
    `analysis` keeps one of this very model that proved the same groups, they are not proved again. `otherwise` says
    what may be done with another structure.

    Raises:
        InputError: the model has another structure (says where), or the policy was applied to it before.
    """
    if said := unlike(point, model):
        raise InputError(f"the policy is for another structure: {said}{f'; {otherwise}' if otherwise else ''}")
    _warn_of_inputs(point.base, example)
    widths = point.policy.as_dict()
    groups = tuple(replace(g, grid=tuple(sorted({widths[g.name], g.width}))) for g in point.base.groups)
    kept = None if analysis is None else found_analysis(model, example, analysis)
    if kept is not None and {_places(g) for g in groups if g.slices} <= {_places(g) for g in kept}:
        return Structure(groups, with_groups(kept.ops, groups))
    return declared(model, example, groups)


def unlike(point: Point, model: nn.Module) -> str:
    """What of the policy's dense model is not so in `model`, as `difference` has it.

    Raises:
        InputError: the dense model is wrapped in another module, or the policy was applied to it before.
    """
    said = difference(point.base, model)
    if said and (inner := unwrapped(model)) is not model and not difference(point.base, inner):
        way = "_orig_mod" if hasattr(model, "_orig_mod") else "module"
        raise InputError(f"the model is wrapped in {type(model).__name__}: pass the model inside, its `.{way}`")
    if said and _was_pruned(point, model):
        raise InputError(f"policy {point.id} was applied to this model before; apply it to the dense model")
    return said


def _places(group: Group) -> tuple[Any, ...]:
    """What was proved of a group: which tensors shrink with which of its atoms."""
    return group.kind, group.width, frozenset(group.slices), frozenset(group.sizes), frozenset(group.stands)


def difference(base: Base, model: nn.Module) -> str:
    """What of the policy's dense model is not so in `model`, in one line; "" where all that the file knows agrees."""
    if said := misfits(model, base.groups):
        return named(said)
    shapes = {name: tuple(t.shape) for name, t in named_tensors(model).items()}
    other = {
        name: f"policy says {list(shape)}, model has {list(shapes[name])}"
        for name, shape in base.shapes.items()
        if name in shapes and shapes[name] != tuple(shape)
    }
    if said := wider(model, base.groups) if other else {}:
        return named(said)
    own, count = sum(p.numel() for p in model.parameters()), base.costs.get("params")
    if other or count is None or own == count:
        return named(other)
    return named(wider(model, base.groups)) or (
        f"the groups agree, but the model has {own:,} parameters and the policy's {int(count):,}: a layer outside the "
        "groups is another one (another number of classes?)"
    )


def _was_pruned(point: Point, model: nn.Module) -> bool:
    """Whether every tensor that the point narrows has the size that it gives it."""
    base, own = point.base, named_tensors(model)
    shapes = dense_shapes(base.groups, base.shapes)
    gone = removed_positions(Structure(base.groups, ()), point.keep, shapes, blocks=False)
    sizes = {(name, dim): shapes[name][dim] - int(positions.sum()) for (name, dim), positions in gone.items()}
    return bool(sizes) and all(name in own and own[name].shape[d] == size for (name, d), size in sizes.items())


def _warn_of_inputs(base: Base, example: Any) -> None:
    """Ratios of MACs hold for the inputs that they were counted on; the policy itself holds for others too."""
    ours = [spec["shape"][1:] for spec in described(example)]
    theirs = [list(spec["shape"])[1:] for spec in base.inputs if "shape" in spec]
    if theirs and ours != theirs:
        warnings.warn(
            f"the policy was found on inputs of {theirs} a sample, these are {ours}: its ratios of MACs are for those",
            stacklevel=5,
        )
