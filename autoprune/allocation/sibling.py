"""A policy of one network as wishes for a deeper or wider sibling: by stage, by relative depth, and projected anew."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

from autoprune.allocation.budget import Limits, Projector
from autoprune.allocation.depth import AtDepth
from autoprune.errors import InputError
from autoprune.matrices import WEIGHT
from autoprune.policy import IntArray, Policy, canonical
from autoprune.protocols import Cost, FloatArray
from autoprune.structure import Group, Slice, Structure

Way = Literal["direct", "interpolated", "mean"]
NUMBER = re.compile(r"\d+|\*")
"""A number in a name, or the * of a group that a container ties over the layers."""
SAME = 1e-9
"""Relative depths that differ by less are one."""
STAYS = 0.5
"""A block is there from this wish on: its nearest ones in the policy are."""
Stage = tuple[str, str]
"""Kind and name with a * for what counts its layers, such as ("channel", "layer1.*.conv1")."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What share of its atoms a group should keep, how that was found, and the least that the policy's space allows."""

    ratio: float
    way: Way
    least: float = 0.0


@dataclass(frozen=True)
class Network:
    """What tells the layers of a network apart: its groups in their order, and dense shapes of its tensors by name."""

    groups: tuple[Group, ...]
    shapes: Mapping[str, Sequence[int]]

    @property
    def names(self) -> set[str]:
        """Of groups, tensors and the modules that hold them."""
        found = {g.name for g in self.groups}
        for tensor in self.shapes or {s.tensor for g in self.groups for s in g.slices}:
            parts = tensor.split(".")
            found |= {".".join(parts[: n + 1]) for n in range(len(parts))}
        return found


def wishes(source: Network, policy: Policy, target: Network) -> dict[str, Wish]:
    """What each group of `target` should keep by a `policy` of `source`; groups without a wish stay dense.

    A stage is what differs in the number of its layer alone, in runs of one dense width. Layer i of n stands at depth
    i / (n - 1) of it, and between layers of the policy ratios are interpolated. A group whose stage the policy does not
    have gets the mean of those nearest by name; one that the policy might have narrowed, and did not have as a group,
    stays dense, as do kinds that the policy does not have.

    Raises:
        InputError: no group of `target` has a partner.
    """
    kinds = {g.kind for g in source.groups}
    kept = _kept(source.groups, policy)
    stage_of = _stages(source, target)
    theirs, ours = (_by_stage(n.groups, stage_of) for n in (source, target))
    found: dict[str, Wish] = {}
    for stage in ours:
        if stage in theirs:
            found |= _staged(theirs[stage], ours[stage], kept)
    if not found:
        raise InputError(_strangers(source.groups, target.groups))
    left = _LeftDense(source, stage_of)
    for group in target.groups:
        if group.name not in found and group.kind in kinds and not left(group):
            found[group.name] = _mean_of_nearest(group, source.groups, kept, stage_of)
    return {g.name: found[g.name] for g in target.groups if g.name in found}


def fitted(structure: Structure, costs: Mapping[str, Cost], wish: FloatArray, limits: Limits) -> Policy:
    """The policy nearest to the ratios `wish` [groups] within `limits`, with no room for one more cell.

    Blocks of a wish of a half or more stay, and widths are projected at that depth. Where even the narrowest do not
    fit, the block of the least wish goes too, the last one never.

    Raises:
        InputError: a limit lies below what the grids can reach (the message names the range).
    """
    projector = Projector(structure, costs)
    blocks = [i for i, g in enumerate(structure.groups) if g.kind == "block"]
    if not blocks:
        return projector.project(wish, limits)
    projector.check(limits)
    present = {i for i in blocks if wish[i] >= STAYS}
    order = sorted(blocks, key=lambda i: (wish[i], (i * (5**0.5 - 1) / 2) % 1.0))  # equal ones go far from each other
    widths = _at_depth(structure, costs, wish, present, limits)
    while widths is None and len(present) > 1:
        present.remove(next(i for i in order if i in present))
        widths = _at_depth(structure, costs, wish, present, limits)
    if widths is None:
        low = ", ".join(f"{name}={limit:.4g}" for name, limit in limits.items())
        raise InputError(f"{low} is out of reach while one of {len(blocks)} blocks stays; ask for more")
    positions = projector.codec.positions(widths)
    return projector.codec.policy(projector.give_back(positions, limits, wish))


def _at_depth(
    structure: Structure, costs: Mapping[str, Cost], wish: FloatArray, present: set[int], limits: Limits
) -> IntArray | None:
    """Widths with the blocks `present` alone, the others projected; None where not even the narrowest fit."""
    groups = structure.groups
    start = [0 if g.kind == "block" and i not in present else g.width for i, g in enumerate(groups)]
    widths = canonical(structure, np.array(start, dtype=np.int64))
    hidden = {i for block, held in structure.inside if not widths[block] for i in held}
    free = np.array([i for i, g in enumerate(groups) if g.kind != "block" and i not in hidden], dtype=np.int64)
    left = Structure(tuple(groups[i] for i in free), (), fingerprint="at a depth")
    projector = Projector(left, {name: AtDepth(cost, widths, free) for name, cost in costs.items()})
    try:
        projector.check(limits)
    except InputError:
        return None
    widths[free] = projector.project(wish[free], limits).array(left)
    return widths


def _kept(groups: Sequence[Group], policy: Policy) -> dict[str, float]:
    """Group -> share of its atoms that stay; nothing is known of what lies inside of absent blocks."""
    widths = policy.as_dict()
    inside = Structure(tuple(groups), ()).inside
    hidden = {groups[i].name for block, held in inside if not widths[groups[block].name] for i in held}
    return {g.name: widths[g.name] / g.width for g in groups if g.name not in hidden}


@dataclass(frozen=True)
class _Stages:
    """The stage of a group, and the name of anything with a * for what counts layers."""

    counters: Mapping[str, frozenset[int]]
    before: tuple[str, str] = ("", "")

    def __call__(self, group: Group) -> Stage:
        return group.kind, self.starred(group.name, group.kind == "block")

    def starred(self, name: str, is_block: bool = False) -> str:
        """`name` with a * in place of every number that counts layers.

        The number of a role ("conv2" at the end of a name) counts none, but for a block, which has no parts.
        """
        name = self.short(name)
        counting = self.counters.get(NUMBER.sub("#", name), frozenset())
        last = name.rpartition(".")[2]
        role = len(name) - len(last) if not is_block and not last.isdigit() else len(name)
        found, end = [], 0
        for place, match in enumerate(NUMBER.finditer(name)):
            counts = place in counting and match.start() < role
            found += [name[end : match.start()], "*" if counts else match[0]]
            end = match.end()
        return "".join([*found, name[end:]])

    def short(self, name: str) -> str:
        """Without what all names of its network begin with, where the networks differ in that."""
        for before in self.before:
            if before and name.startswith(before):
                return name[len(before) :]
        return name


def _stages(source: Network, target: Network) -> _Stages:
    """Numbers in names count layers where the two networks have other ones at the same place."""
    plain = _Stages(_counters(source.names, target.names))
    both = [{plain(g) for g in n.groups} for n in (source, target)]
    if both[0] & both[1]:
        return plain
    before = (_common(source.groups), _common(target.groups))  # one may be wrapped: backbone.layer1
    short = _Stages({}, before).short
    names = ({short(n) for n in one.names if n.startswith(b)} for one, b in zip((source, target), before, strict=True))
    return _Stages(_counters(*names), before)


def _common(groups: Sequence[Group]) -> str:
    """What the names of all groups begin with, whole parts of names up to the first with a number in it."""
    parts = [g.name.split(".")[:-1] for g in groups]
    shared = []
    for words in zip(*parts, strict=False):
        if len(set(words)) > 1 or NUMBER.search(words[0]):
            break
        shared.append(words[0])
    return "".join(f"{word}." for word in shared)


def _counters(*names: Iterable[str]) -> dict[str, frozenset[int]]:
    """Pattern of a name -> places of its numbers where the two networks have other ones behind the same beginning."""
    seen: list[dict[str, dict[tuple[str, ...], set[str]]]] = []
    for some in names:
        found: dict[str, dict[tuple[str, ...], set[str]]] = {}
        for name in some:
            numbers = tuple(NUMBER.findall(name))
            behind = found.setdefault(NUMBER.sub("#", name), {})
            for place, number in enumerate(numbers):
                behind.setdefault(numbers[:place], set()).add(number)
        seen.append(found)
    first, second = seen
    return {
        pattern: frozenset(len(start) for start, held in behind.items() if second[pattern].get(start, held) != held)
        for pattern, behind in first.items()
        if pattern in second
    }


def _by_stage(groups: Iterable[Group], stage_of: _Stages) -> dict[Stage, list[Group]]:
    found: dict[Stage, list[Group]] = {}
    for group in groups:
        found.setdefault(stage_of(group), []).append(group)
    return found


def _staged(theirs: Sequence[Group], ours: Sequence[Group], kept: Mapping[str, float]) -> dict[str, Wish]:
    """Wishes of the layers `ours` of a stage by those of the policy, run by run where both have as many widths."""
    runs = [[list(run) for _, run in groupby(some, key=lambda g: g.width)] for some in (theirs, ours)]
    pairs = zip(*runs, strict=True) if len(runs[0]) == len(runs[1]) else [(list(theirs), list(ours))]
    found: dict[str, Wish] = {}
    for a, b in pairs:
        found |= _interpolated(a, b, kept)
    return found


def _interpolated(theirs: Sequence[Group], ours: Sequence[Group], kept: Mapping[str, float]) -> dict[str, Wish]:
    known = [(at, g) for at, g in zip(_depths(len(theirs)), theirs, strict=True) if g.name in kept]
    if not known:
        return {}
    places, ratios = [at for at, _ in known], [kept[g.name] for _, g in known]
    depths, least = _depths(len(ours)), _least(g for _, g in known)
    near = [min(abs(at - place) for place in places) <= SAME for at in depths]
    wanted = np.interp(depths, places, ratios).tolist()
    if ours[0].kind == "block" and max(ratios) > 0 and max(wanted) < STAYS:  # some were kept, so one is kept here
        there = next(place for place, ratio in zip(places, ratios, strict=True) if ratio)
        wanted[int(np.argmin(np.abs(np.array(depths) - there)))] = 1.0
    return {
        g.name: Wish(ratio, "direct" if same else "interpolated", least)
        for g, ratio, same in zip(ours, wanted, near, strict=True)
    }


def _depths(n: int) -> list[float]:
    """Of layer i in a stage of n, from 0 to 1; one alone is its own middle."""
    return [0.5] if n == 1 else [i / (n - 1) for i in range(n)]


def _least(groups: Iterable[Group]) -> float:
    """The narrowest width that the space of the policy allowed any of them, as a share."""
    return min((g.grid[0] / g.width for g in groups), default=0.0)


def _mean_of_nearest(group: Group, groups: Sequence[Group], kept: Mapping[str, float], stage_of: _Stages) -> Wish:
    """Of the groups of its kind whose names begin as its own does for longest; a block stays where it may."""
    own = stage_of(group)[1].split(".")

    def shared(other: Group) -> int:
        words = zip(own, stage_of(other)[1].split("."), strict=False)
        return next((i for i, (a, b) in enumerate(words) if a != b), len(own))

    alike = [g for g in groups if g.kind == group.kind and g.name in kept]
    most = max((shared(g) for g in alike), default=0)
    nearest = [g for g in alike if shared(g) == most]
    mean = float(np.mean([kept[g.name] for g in nearest])) if nearest else 1.0
    return Wish(max(mean, STAYS) if group.kind == "block" else mean, "mean", _least(nearest))


class _LeftDense:
    """Whether the policy's network has such a layer, and the policy no group that narrows it."""

    def __init__(self, source: Network, stage_of: _Stages) -> None:
        self._stage_of, self._shapes = stage_of, source.shapes
        self._cut = {(g.kind, *self._place(s)) for g in source.groups for s in g.slices}
        self._names = {stage_of.starred(name, is_block) for name in source.names for is_block in (False, True)}

    def __call__(self, group: Group) -> bool:
        if not self._shapes:  # a file of 0.1.0 does not say what else there is
            return True
        known = self._stage_of(group)[1] in self._names
        if group.matrices:  # one that has zeros is called as its weight
            return known and group.kind == WEIGHT
        return known and (group.kind, *self._place(group.slices[0])) not in self._cut

    def _place(self, part: Slice) -> tuple[str, str, int]:
        module, _, tensor = part.tensor.rpartition(".")
        return self._stage_of.starred(module), tensor, part.dim


def _strangers(theirs: Sequence[Group], ours: Sequence[Group]) -> str:
    """Why nothing can be carried over, in one line."""

    def told(groups: Sequence[Group]) -> str:
        counts = Counter(g.kind for g in groups)
        kinds = ", ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in counts.items())
        return f"{kinds} ({', '.join(g.name for g in groups[:2])}{', ...' if len(groups) > 2 else ''})"

    have = told(ours) if ours else "no groups"
    return (
        f"the model is no sibling of the policy's: the policy has {told(theirs)}, the model {have}, and none of them "
        "correspond; search the model itself (autoprune search)"
    )
