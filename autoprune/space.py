"""What a user allows the search to do: which groups, down to how narrow, in which steps. It restricts a Structure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from autoprune.errors import InputError, did_you_mean
from autoprune.structure import Group, Structure

OVERRIDABLE = ("max_sparsity", "multiple_of")


@dataclass(frozen=True)
class Space:
    """The searched part of a structure. Globs speak of group names; a later override wins over an earlier one.

    `granularity` lists the kinds that are searched, `max_sparsity` is the largest share of a group's atoms that may
    go, `multiple_of` the step of the widths, `overrides` maps a glob to other values of these two.
    """

    granularity: tuple[str, ...] = ("channel",)
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    multiple_of: int = 1
    max_sparsity: float = 0.9
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "overrides", MappingProxyType({k: dict(v) for k, v in self.overrides.items()}))
        _check("space", self.multiple_of, self.max_sparsity)
        for glob, values in self.overrides.items():
            for key in values:
                if key not in OVERRIDABLE:
                    hint = did_you_mean(key, OVERRIDABLE)
                    raise InputError(f"space.overrides[{glob!r}]: unknown key {key!r}; {hint}")
            _check(f"space.overrides[{glob!r}]", *self._settings(values))

    def settings(self, name: str) -> tuple[int, float]:
        """(multiple_of, max_sparsity) of the group called `name`."""
        values: dict[str, Any] = {}
        for glob, override in self.overrides.items():
            if fnmatchcase(name, glob):
                values |= override
        return self._settings(values)

    def _settings(self, values: Mapping[str, Any]) -> tuple[int, float]:
        return values.get("multiple_of", self.multiple_of), values.get("max_sparsity", self.max_sparsity)


def restrict(structure: Structure, space: Space) -> Structure:
    """`structure` with the grids of `space`; what it leaves out moves to `frozen`. The fingerprint stays.

    Raises:
        InputError: a glob matches no group (the message lists the names), or no group is left to search.
    """
    if structure.groups:
        _check_globs(structure, space)
        _check_kinds(structure, space)
    groups: list[Group] = []
    frozen = dict(structure.frozen)
    for group in structure.groups:
        reason = _left_out(group, space)
        if reason is None:
            groups.append(replace(group, grid=_grid(group, *space.settings(group.name))))
        else:
            frozen[group.name] = reason
    if not groups:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(frozen.items())[:5]) or "the model has no groups"
        raise InputError(f"nothing is left to search ({why})")
    return Structure(tuple(groups), structure.ops, frozen, structure.fingerprint)


def _left_out(group: Group, space: Space) -> str | None:
    """Why the group is not searched, or None."""
    if group.kind not in space.granularity:
        return f"its kind is {group.kind}, the job searches {', '.join(space.granularity)} (space.granularity)"
    if not any(fnmatchcase(group.name, glob) for glob in space.include):
        return "not among space.include"
    for glob in space.exclude:
        if fnmatchcase(group.name, glob):
            return f"excluded by {glob!r} (space.exclude)"
    multiple_of, max_sparsity = space.settings(group.name)
    if len(_grid(group, multiple_of, max_sparsity)) < 2:
        return f"{group.width} wide: no smaller width with multiple_of {multiple_of} and max_sparsity {max_sparsity}"
    return None


def _grid(group: Group, multiple_of: int, max_sparsity: float) -> tuple[int, ...]:
    """Multiples from the floor up, the full width last; only widths that the structure itself allows."""
    if group.kind == "block":  # present or not: there is nothing between
        return group.grid
    least = max(math.ceil((1 - max_sparsity) * group.width - 1e-9), multiple_of)  # 1 - 0.9 is a hair above 0.1
    return tuple(w for w in group.grid if w == group.width or (w >= least and w % multiple_of == 0))


def _check_globs(structure: Structure, space: Space) -> None:
    for where, globs in (("include", space.include), ("exclude", space.exclude), ("overrides", space.overrides)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in structure.names):
                hint = did_you_mean(glob, structure.names)
                raise InputError(f"space.{where}: {glob!r} matches no group; {hint}")


def _check_kinds(structure: Structure, space: Space) -> None:
    """Of several kinds each must be there: one that is asked for in vain would go unnoticed."""
    there = {group.kind for group in structure.groups}
    lost = [kind for kind in space.granularity if kind not in there]
    if lost and len(space.granularity) > 1:
        had = ", ".join(sorted(there))
        raise InputError(f"space.granularity: the model has no groups of kind {', '.join(lost)}; it has {had}")


def _check(where: str, multiple_of: Any, max_sparsity: Any) -> None:
    if not isinstance(multiple_of, int) or multiple_of < 1:
        raise InputError(f"{where}.multiple_of must be an integer >= 1, not {multiple_of!r}")
    if not isinstance(max_sparsity, int | float) or not 0 <= max_sparsity <= 1:
        raise InputError(f"{where}.max_sparsity must be between 0 and 1, not {max_sparsity!r}")
