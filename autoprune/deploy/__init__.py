"""Containers, one file each: what a deployment format can hold, known before the search."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from autoprune import plugins
from autoprune.errors import InputError
from autoprune.policy import Policy
from autoprune.space import Space, restrict
from autoprune.structure import Group, Op, Structure

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
        said = "; ".join(f"{name}: {reason}" for name, reason in list(held.frozen.items())[:3])
        raise InputError(f"deploy: {deploy} can hold nothing of what the job searches ({said})")
    return held


def misfits(structure: Structure, policy: Policy, deploy: str) -> list[str]:
    """What of `policy` the container called `deploy` cannot hold, a line each, with the nearest width that it can."""
    held: Structure = plugins.load("deploy", deploy)().restrict(structure)
    grids, found = {g.name: g.grid for g in held}, []
    for group in structure:
        width = policy.as_dict()[group.name]
        fits = grids.get(group.name, (group.width,))
        if width not in fits:
            nearest = min(fits, key=lambda w: (abs(w - width), -w))
            found.append(f"{group.name} is {width} of {group.width}, the nearest that fits is {nearest}")
    return found


def without(structure: Structure, reason: Callable[[Group], str | None]) -> Structure:
    """The structure without the groups for which there is a `reason`; blocks leave nothing frozen behind."""
    said = {group.name: reason(group) for group in structure}
    groups = tuple(g for g in structure if said[g.name] is None)
    frozen = {g.name: str(said[g.name]) for g in structure if said[g.name] is not None and g.kind != "block"}
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
