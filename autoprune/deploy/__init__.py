"""Containers, one file each: what a deployment format can hold, known before the search."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from autoprune import plugins
from autoprune.errors import InputError
from autoprune.matrices import WEIGHT
from autoprune.policy import Policy
from autoprune.space import Space, restrict
from autoprune.structure import Group, Op, Structure

IN_FLOAT = "this container is written in floating numbers"
"""Why weights of 8 bits cannot be in it."""
LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
"""The number of a layer in the name of a group or a tensor."""


def searched(structure: Structure, space: Space, deploy: str | None = None, step: int = 1) -> Structure:
    """`structure` with the grids of `space`, and of that what the container called `deploy` can hold.

    What it cannot hold moves to `frozen`. The fingerprint stays. `step` is that of `restrict`.

    Raises:
        InputError: as `restrict`, or the container holds nothing of what is left.
    """
    found = restrict(structure, space, step)
    if deploy is None:
        return found
    with plugins.before_work(), plugins.calling("deploy", deploy, "while it restricts the space", (InputError,)):
        held: Structure = plugins.load("deploy", deploy)().restrict(found)
    if not held.groups:
        new = [(name, reason) for name, reason in held.frozen.items() if name not in found.frozen]
        said = "; ".join(f"{name}: {reason}" for name, reason in (new or list(held.frozen.items()))[:3])
        raise InputError(f"deploy: {deploy} can hold nothing of what the job searches ({said})")
    return held


def held_words(deploy: str | None) -> str:
    """What the container called `deploy` holds, as its own documentation begins; "" where it has none."""
    said = "" if deploy is None else (inspect.getdoc(plugins.load("deploy", deploy)) or "").partition("\n")[0]
    return f"deploy: {deploy}: {said}" if said else ""


def joined(held: Structure, whole: Structure) -> Structure | None:
    """All groups of both: what a container holds, and what the job would search without it.

    None where the container leaves nothing out, or calls another group by a name that is taken.
    """
    own = {g.name: g for g in whole}
    if held.groups == whole.groups or any(g.name in own and not same(g, own[g.name]) for g in held):
        return None
    more = tuple(g for g in held if g.name not in own)
    return Structure((*whole.groups, *more), whole.ops, whole.frozen, whole.fingerprint)


def same(a: Group, b: Group) -> bool:
    """Whether two groups are one but for the widths that are allowed."""
    return (a.kind, a.width, a.slices, a.stands, a.matrices) == (b.kind, b.width, b.slices, b.stands, b.matrices)


def check_model(model: nn.Module, deploy: str | None) -> None:
    """InputError where the container called `deploy` says that it holds no such model at all."""
    container: Any = None if deploy is None else plugins.load("deploy", deploy)()
    if deploy is not None and hasattr(container, "check"):
        with plugins.before_work(), plugins.calling("deploy", deploy, "while it looks at the model", (InputError,)):
            container.check(model)


def misfits(structure: Structure, policy: Policy, deploy: str) -> list[str]:
    """What of `policy` the container called `deploy` cannot hold, a line each, with the nearest width that it can."""
    container: Any = plugins.load("deploy", deploy)()
    widths, found = policy.as_dict(), list[str]()
    gone = {
        structure.groups[i].name
        for block, inner in structure.inside
        for i in inner
        if not widths[structure.groups[block].name]
    }
    grids = {g.name: g.grid for g in container.restrict(structure)}
    spared = gone | set(container.together(structure, policy) if hasattr(container, "together") else ())
    alike = _alike(structure, grids)
    layers = {name: sorted(widths[n] for n in names if n not in gone) for name, names in alike.items()}
    for group in (g for g in structure if g.name not in spared):
        width, name = widths[group.name], LAYER.sub("*", group.name, count=1)
        if group.name in grids or name not in layers:
            fits, wish, end = grids.get(group.name, (group.width,)), width, ""
        else:  # one width for all layers: that of the layer in the middle
            fits, wish, end = grids[name], layers[name][len(layers[name]) // 2], " in all layers"
        nearest = min(fits, key=lambda w: (abs(w - wish), -w))
        if width != nearest or (end and len(set(layers[name])) > 1):
            found.append(f"{group.name} is {width} of {group.width}, the nearest that fits is {nearest}{end}")
    return found


def _alike(structure: Structure, grids: Mapping[str, object]) -> dict[str, list[str]]:
    """The groups that a container holds as one over all layers, by its name."""
    found: dict[str, list[str]] = {}
    for group in structure:
        name = LAYER.sub("*", group.name, count=1)
        if group.name not in grids and name in grids:
            found.setdefault(name, []).append(group.name)
    return found


def without(structure: Structure, reason: Callable[[Group], str | None]) -> Structure:
    """The structure without the groups for which there is a `reason`; blocks and bits leave nothing frozen behind."""
    said = {group.name: reason(group) for group in structure}
    groups = tuple(g for g in structure if said[g.name] is None)
    told = (g for g in structure if said[g.name] is not None and (g.narrows or g.kind == WEIGHT))
    frozen = {g.name: str(said[g.name]) for g in told}
    return Structure(groups, structure.ops, {**structure.frozen, **frozen}, structure.fingerprint)


def tied(structure: Structure, groups: Iterable[Group]) -> Structure:
    """The structure with each set of `groups` that differ only in the number of their layer as one group.

    Atom i of it is atom i of every layer, its name has a * in place of the number, its widths are those that all of
    them allow. A set that lacks a layer, or whose layers are not equally wide, moves to `frozen`.
    """
    sets: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        sets.setdefault((LAYER.sub("*", group.name, count=1), group.kind), []).append(group)
    layers = _layers(structure.ops)
    made, frozen, names = list[Group](), dict[str, str](), dict[str, str]()
    for (name, _), members in sets.items():
        wanted = layers.get(name.partition("*")[0], 1) if name not in structure.names else 1  # tied before
        if len({g.width for g in members}) > 1 or len(members) < wanted:
            frozen |= dict.fromkeys(
                (g.name for g in members), "one width for all layers: not all have it, or search it"
            )
            continue
        grid = sorted(set.intersection(*(set(g.grid) for g in members)))
        slices = tuple(part for g in members for part in g.slices)
        sizes = tuple(size for g in members for size in g.sizes)
        made.append(replace(members[0], name=name, slices=slices, grid=tuple(grid), sizes=sizes))
        names |= {g.name: name for g in members}
    gone = {g.name for members in sets.values() for g in members}
    rest = [g for g in structure if g.name not in gone]
    ops = tuple(replace(op, groups=tuple(dict.fromkeys(names.get(n, n) for n in op.groups))) for op in structure.ops)
    return Structure((*made, *rest), ops, {**structure.frozen, **frozen}, structure.fingerprint)


def _layers(ops: Iterable[Op]) -> dict[str, int]:
    """How many numbers stand behind each prefix ("encoder.layer.") of the tensors' names."""
    seen: dict[str, set[str]] = {}
    for op in ops:
        for spec in op.tensors:
            if found := LAYER.search(spec.name):
                seen.setdefault(spec.name[: found.start()], set()).add(found[0])
    return {prefix: len(numbers) for prefix, numbers in seen.items()}
