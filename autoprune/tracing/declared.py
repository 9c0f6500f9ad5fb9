"""A Structure of the groups that a file declares: checked and certified on the model, whatever `analyze` would find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from autoprune.errors import InputError
from autoprune.structure import Group, Slice, Structure
from autoprune.tracing.certify import failures
from autoprune.tracing.copies import private_copy, quiet_random_state
from autoprune.tracing.observe import observe
from autoprune.tracing.ops import with_groups
from autoprune.tracing.sizes import number_at
from autoprune.tracing.slim import named_tensors

MOST_NAMED = 5
MATRIX = 2
"""Dimensions of a weight that is a matrix, at least."""


def declared(model: nn.Module, example_inputs: Any, groups: Sequence[Group]) -> Structure:
    """The Structure of `model` with these groups and no others; what it costs comes from a trace of today.

    A file thus outlives changes of the analysis: a group that is found since stays dense, one that is not found any
    more is used as long as the experiment proves it. The lent model is untouched.

    Raises:
        InputError: a group does not fit the model's tensors, removing it is not masking it, or the model does not run.
    """
    said = misfits(model, groups)
    if said:
        raise InputError(named(said))
    with quiet_random_state(0):
        twin = private_copy(model)
        look = observe(twin, example_inputs)
        narrow = [g for g in groups if g.slices and (g.width > 1 or g.kind == "block")]  # else there is nothing to try
        if narrow and (failed := failures(twin, look, narrow).failed):
            raise InputError(named(failed))
    return Structure(tuple(groups), with_groups(look.ops, groups, look.products))


def misfits(model: nn.Module, groups: Sequence[Group]) -> dict[str, str]:
    """Group name -> why its slices cannot be slices of this model's tensors; empty where all can."""
    tensors = named_tensors(model)
    return {g.name: said for g in groups if (said := _misfit(g, tensors) or _other_parts(model, g))}


def wider(model: nn.Module, groups: Sequence[Group]) -> dict[str, str]:
    """Group name -> words, for groups that fit but leave positions of what produces them to nobody."""
    tensors, said = named_tensors(model), {}
    reach: dict[tuple[str, int], int] = {}
    for part, width in ((s, g.width) for g in groups for s in g.slices):
        key = part.tensor, part.dim
        reach[key] = max(reach.get(key, 0), end_of(part, width))
    for group in (g for g in groups if g.slices):
        first = group.slices[0]
        if tensors[first.tensor].shape[first.dim] > reach[first.tensor, first.dim]:
            said[group.name] = _other_width(group, tensors)
    return said


def dense_shapes(groups: Sequence[Group], known: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Shapes of the tensors that groups cut: as they are `known`, and as far as the slices reach."""
    shapes = {name: list(shape) for name, shape in known.items()}
    for part, width in ((s, g.width) for g in groups for s in g.slices):
        found = shapes.setdefault(part.tensor, [])
        found += [0] * (part.dim + 1 - len(found))
        found[part.dim] = max(found[part.dim], end_of(part, width))
    return shapes


def named(said: Mapping[str, str]) -> str:
    """A named diff in one line: the first few, and how many more."""
    lines = [f"{name}: {reason}" for name, reason in said.items()]
    more = f" and {len(lines) - MOST_NAMED} more" if len(lines) > MOST_NAMED else ""
    return "; ".join(lines[:MOST_NAMED]) + more


def end_of(part: Slice, width: int) -> int:
    """The first position behind the last one that `part` owns in a group of `width` atoms."""
    held = width if part.count is None else min(width, part.first + part.count)
    return max((part.positions(atom).stop for atom in (part.first, held - 1)), default=0)


def _misfit(group: Group, tensors: Mapping[str, Tensor]) -> str:
    first = group.slices[0].tensor if group.slices else ""
    for part in group.slices:
        tensor = tensors.get(part.tensor)
        if tensor is None:
            lacks = f"it lacks the tensor {part.tensor!r}"
            return f"the model has no such group ({lacks})" if part.tensor == first else lacks
        if part.dim >= tensor.dim():
            return f"{part.tensor} has {tensor.dim()} dimensions, the policy cuts dimension {part.dim}"
        if end_of(part, group.width) > tensor.shape[part.dim]:
            return _other_width(group, tensors)
    lost = [name for name in group.matrices if name not in tensors or tensors[name].dim() < MATRIX]
    if lost:
        return f"the model has no matrix {lost[0]!r}"
    return "" if group.slices or group.matrices else "it has no slices"


def _other_parts(model: nn.Module, group: Group) -> str:
    """The first number of a group that is another one in this model, or the first module of a block that it lacks."""
    held = dict(model.named_modules(remove_duplicate=False)) if group.stands else {}
    for stand in group.stands:
        if stand.module not in held:
            return f"the model has no such block (it lacks the module {stand.module!r})"
    for size in group.sizes:
        if (found := number_at(model, size.attribute, size.index)) != size.value:
            entry = "" if size.index is None else f"[{size.index}]"
            return f"policy says {size.attribute}{entry} is {size.value}, the model has {found}"
    return ""


def _other_width(group: Group, tensors: Mapping[str, Tensor]) -> str:
    """How many atoms the model has, by the first dimension of another size that is the group's alone."""
    for part in group.slices:
        shape = tensors[part.tensor].shape if part.tensor in tensors else ()
        here = [s for s in group.slices if (s.tensor, s.dim) == (part.tensor, part.dim)]
        reach = max(end_of(s, group.width) for s in here)
        alone = reach == sum(len(s.positions(atom)) for s in here for atom in range(group.width))
        if alone and part.dim < len(shape) and shape[part.dim] != reach:
            return f"policy says {group.width} wide, model has {shape[part.dim] * group.width // reach}"
    first = group.slices[0].tensor
    return f"policy says {group.width} wide, model has {first} of {list(tensors[first].shape)}"
