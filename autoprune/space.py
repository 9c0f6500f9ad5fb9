"""What a user allows the search to do: which groups, down to how narrow, in which steps. It restricts a Structure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal

from autoprune.errors import InputError, did_you_mean
from autoprune.matrices import WEIGHT, numbers_of, sparse_pattern, weights_of, with_precisions, with_weights
from autoprune.structure import SHAPELESS, Group, Structure

Step = int | Literal["auto"]
AUTO = "auto"
WIDTHS, WIDE, WIDE_STEP = 32, 128, 8
"""`auto` leaves so many widths at most; from so many atoms on a step has so many channels at least (ALGORITHMS 2a)."""
STEPS = 4
"""A step that is given from outside holds for groups of channels that are at least so many steps wide."""
OTHER_KIND = "its kind is"
"""How the reason begins for which groups of a kind that is not searched are frozen."""
OVERRIDABLE = ("max_sparsity", "multiple_of")


@dataclass(frozen=True)
class Space:
    """The searched part of a structure. Globs speak of group names; a later override wins over an earlier one.

    `granularity` lists the kinds that are searched, `auto` all structured ones that the model has; `weight`, or a
    pattern such as "2:4" in its place, makes a group of every matrix whose zeros are searched. `max_sparsity` is the
    largest share of a group's atoms that may go (of blocks, which are one atom each, only where an override says
    so; one that holds an excluded group stays as well), `multiple_of` the step of the widths in channels (`auto`
    leaves at most 32 widths a group), `overrides` maps a glob to other values of these two. How many weights may go an
    override alone says, and no step concerns them. `bits` are the precisions that weights may have, 32 among them; none
    where it is empty. They are searched whatever `granularity` says.
    """

    granularity: tuple[str, ...] = (AUTO,)
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    multiple_of: Step = "auto"
    max_sparsity: float = 0.9
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    bits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "overrides", MappingProxyType({k: dict(v) for k, v in self.overrides.items()}))
        sparse_pattern(self.granularity)
        _check("space", self.multiple_of, self.max_sparsity)
        for glob, values in self.overrides.items():
            for key in values:
                if key not in OVERRIDABLE:
                    hint = did_you_mean(key, OVERRIDABLE)
                    raise InputError(f"space.overrides[{glob!r}]: unknown key {key!r}; {hint}")
            _check(f"space.overrides[{glob!r}]", *self._settings(values))

    def settings(self, name: str) -> tuple[Step, float]:
        """(multiple_of, max_sparsity) of the group called `name`."""
        return self._settings(self.overridden(name))

    def overridden(self, name: str) -> dict[str, Any]:
        """What the overrides say of the group called `name`."""
        values: dict[str, Any] = {}
        for glob, override in self.overrides.items():
            if fnmatchcase(name, glob):
                values |= override
        return values

    def _settings(self, values: Mapping[str, Any]) -> tuple[Step, float]:
        return values.get("multiple_of", self.multiple_of), values.get("max_sparsity", self.max_sparsity)


def restrict(structure: Structure, space: Space, step: int = 1) -> Structure:
    """`structure` with the grids of `space`; what it leaves out moves to `frozen`. The fingerprint stays.

    Where `space` leaves the step of the widths to us (auto), groups of channels that are wide enough have none below
    `step` channels: what computes them takes as long for the widths between. Under a pattern n:m what narrows the
    inputs of its matrices has only widths that leave a multiple of m of them.

    Raises:
        InputError: a glob matches no group (the message lists the names), no group is left to search, a step that is
            asked for breaks a pattern, or an override leaves less than one weight a row.
    """
    if space.bits:
        structure = with_precisions(structure, space.bits)
    found = structure.frozen
    pattern = sparse_pattern(space.granularity)
    if pattern is not None:
        structure = with_weights(structure, pattern)
    if structure.groups:
        _check_globs(structure, space, structure.frozen.keys() - found.keys())
        _check_kinds(structure, space)
    groups: list[Group] = []
    frozen = dict(structure.frozen)
    kept = _kept_blocks(structure, space)
    patterned = _Patterned(structure, [g for g in structure if g.pattern and _left_out(g, space, step) is None])
    for group in structure.groups:
        reason = _left_out(group, space, step) if group.name not in kept else "it holds what is to stay"
        if reason is None:
            group = replace(group, grid=patterned.grid(group, space, _grid(group, space, step)))
            if pattern and len(group.grid) < 2:
                reason = f"{group.width} wide: {pattern} divides no smaller width for what reads it"
        if reason is None:
            groups.append(group)
        elif group.narrows or group.kind == WEIGHT:  # what a block is made of is not frozen for that, nor what has bits
            frozen[group.name] = reason
    _check_rows(structure, [g.name for g in groups if g.kind == WEIGHT and not g.pattern], space)
    if not groups:
        raise InputError(f"nothing is left to search ({_why_nothing(structure, space, frozen)})")
    return Structure(tuple(groups), structure.ops, frozen, structure.fingerprint)


def _why_nothing(structure: Structure, space: Space, frozen: Mapping[str, str]) -> str:
    """The commonest reasons, of groups of the kinds that are searched before others."""
    other = {g.name for g in structure if (reason := _other_kind(g, space)) and reason == frozen.get(g.name)}
    of: dict[str, list[str]] = {}
    for name in sorted(frozen, key=lambda name: name in other):
        of.setdefault(frozen[name], []).append(name)
    told = (
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}" for reason, names in of.items()
    )
    return "; ".join([*told][:3]) or "the model has no groups"


def _other_kind(group: Group, space: Space) -> str | None:
    """Why a group is not of a kind that is searched, or None."""
    if group.kind in (*space.granularity, *SHAPELESS) or space.granularity == (AUTO,):
        return None
    return f"{OTHER_KIND} {group.kind}, the job searches {', '.join(space.granularity)} (space.granularity)"


def _kept_blocks(structure: Structure, space: Space) -> set[str]:
    """Blocks that may not go: an override says so of them, or they hold a group that is excluded by name."""
    kept = {
        structure.groups[block].name
        for block, inner in structure.inside
        if any(_named(structure.groups[i], glob) for i in inner for glob in space.exclude)
    }
    for glob, values in space.overrides.items():
        if values.get("max_sparsity", 1) < 1:
            kept |= {g.name for g in structure.groups if g.kind == "block" and fnmatchcase(g.name, glob)}
    return kept


def _named(group: Group, glob: str) -> bool:
    """Whether a glob speaks of a group that has to stay for that; bits and zeros stay where their weights are not."""
    return not group.matrices and fnmatchcase(group.name, glob)


def _left_out(group: Group, space: Space, step: int) -> str | None:
    """Why the group is not searched, or None."""
    if (other := _other_kind(group, space)) is not None:
        return other
    if not any(fnmatchcase(group.name, glob) for glob in space.include):
        return "not among space.include"
    for glob in space.exclude:
        if fnmatchcase(group.name, glob):
            return f"excluded by {glob!r} (space.exclude)"
    multiple_of, max_sparsity = space.settings(group.name)
    if group.kind == WEIGHT:
        why = _kept_dense(group, max_sparsity) if len(group.grid) > 1 else "its outputs read one number each"
        return why if len(_grid(group, space, step)) < 2 else None
    if group.matrices:
        held = space.overridden(group.name).get("max_sparsity", 1) < 1 - group.grid[0] / group.width
        return "space.overrides keeps its precision" if held else None
    if len(_grid(group, space, step)) < 2:
        return f"{group.width} wide: no smaller width with multiple_of {multiple_of} and max_sparsity {max_sparsity}"
    return None


def _kept_dense(group: Group, max_sparsity: float) -> str:
    """Why an override leaves a group of weights no width but the dense one."""
    said = "space.overrides keeps it dense"
    taken = 1 - group.grid[0] / group.width
    more = f": max_sparsity {max_sparsity:g} is less than the {taken:g} that {group.pattern} takes"
    return said + more if group.pattern else said


def _grid(group: Group, space: Space, channels: int) -> tuple[int, ...]:
    """Multiples from the floor up, the full width last; only widths that the structure itself allows."""
    multiple_of, max_sparsity = space.settings(group.name)
    if group.kind == WEIGHT:
        least = (1 - space.overridden(group.name).get("max_sparsity", 1)) * group.width
        return tuple(w for w in group.grid if w > least - 1 + 1e-6)  # widths are shares, rounded down
    if not group.narrows:  # a block is present or not, a precision is one of a few
        return group.grid
    step = atoms_a_step(group, multiple_of, channels)
    least = max(math.ceil((1 - max_sparsity) * group.width - 1e-9), step)  # 1 - 0.9 is a hair above 0.1
    return tuple(w for w in group.grid if w == group.width or (w >= least and w % step == 0))


class _Patterned:
    """What the groups do to the inputs of the matrices that `held`, groups of weights, may give a pattern n:m."""

    def __init__(self, structure: Structure, held: Sequence[Group]) -> None:
        self._pattern = held[0].pattern if held else ""
        self._of = numbers_of(self._pattern)[1] if held else 1
        names = {g.name for g in held}
        self._inputs = {(spec.name, 1 - op.outputs) for op, spec in weights_of(structure) if spec.name in names}

    def grid(self, group: Group, space: Space, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Of a group's `grid` the widths that leave each of these matrices a multiple of m inputs.

        Raises:
            InputError: a step that the space asks for leaves other ones.
        """
        owned = {place: n for place, n in _positions_an_atom(group).items() if place in self._inputs}
        multiple_of = space.settings(group.name)[0]
        step = 0 if multiple_of == "auto" else atoms_a_step(group, multiple_of)
        for (tensor, _), each in owned.items():
            if each * step % self._of:
                where = "overrides" if "multiple_of" in space.overridden(group.name) else "multiple_of"
                raise InputError(
                    f"space.{where}: in steps of {multiple_of} {group.name!r} leaves {tensor!r} numbers of inputs that "
                    f"{self._pattern} does not divide; let multiple_of be auto or a multiple of {self._of}"
                )
        return tuple(w for w in grid if not any(each * (group.width - w) % self._of for each in owned.values()))


def atoms_a_step(group: Group, multiple_of: Step, channels: int = 1) -> int:
    """How many atoms make a step of `multiple_of` channels; of `channels` or more where that is auto."""
    each = _channels_an_atom(group)
    if multiple_of != "auto":
        return _atoms(multiple_of, each)
    step = 1
    while group.width // step > WIDTHS:
        step *= 2
    step = max(step, math.ceil(WIDE_STEP / each)) if group.width >= WIDE else step
    wide = group.kind == "channel" and group.width * each >= STEPS * channels
    return math.lcm(step, _atoms(channels, each)) if wide else step


def _atoms(channels: int, each: int) -> int:
    """The fewest atoms of `each` channels that make a multiple of `channels`."""
    return channels // math.gcd(channels, each)


def _channels_an_atom(group: Group) -> int:
    """Channels that a user counts for one atom: the fewest positions that it owns in any tensor.

    One where maps are flattened behind it or a fused weight holds it twice, several where grouped convolutions tie
    them.
    """
    return max(1, min(filter(None, _positions_an_atom(group).values()), default=1))


def _positions_an_atom(group: Group) -> dict[tuple[str, int], int]:
    """(tensor, dim) -> positions that the first atom owns there."""
    owned: dict[tuple[str, int], int] = {}
    for s in group.slices:
        owned[s.tensor, s.dim] = owned.get((s.tensor, s.dim), 0) + len(s.positions(0))
    return owned


def _check_rows(structure: Structure, names: Collection[str], space: Space) -> None:
    """Of the matrices called `names` no override may leave less than a weight for each output."""
    for op, spec in weights_of(structure):
        if spec.name not in names:
            continue
        rows, count = spec.shape[op.outputs], math.prod(spec.shape)
        wanted = space.overridden(spec.name).get("max_sparsity", 0.0)
        if (1 - wanted) * count < rows - 1e-6:  # 1 - 0.9 is a hair below 0.1
            most = math.floor((1 - rows / count) * 1e4) / 1e4
            raise InputError(
                f"space.overrides: max_sparsity {wanted:g} leaves {spec.name!r} less than one weight for each of its "
                f"{rows} rows of {count // rows}; at most {most:g} may go"
            )


def _check_globs(structure: Structure, space: Space, others: Collection[str] = ()) -> None:
    """Each glob must match a group, or one of the `others`, which are none for a reason of their own."""
    for where, globs in (("include", space.include), ("exclude", space.exclude), ("overrides", space.overrides)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in (*structure.names, *others)):
                hint = did_you_mean(glob, structure.names)
                raise InputError(f"space.{where}: {glob!r} matches no group; {hint}")


def _check_kinds(structure: Structure, space: Space) -> None:
    """Each kind must be there: one that is asked for in vain would go unnoticed."""
    there = {group.kind for group in structure.groups}
    lost = [kind for kind in space.granularity if kind not in (*there, AUTO) and ":" not in kind]
    if lost:
        had = ", ".join(sorted(there))
        both = {"head", "kv_group"} <= {*space.granularity, *there}
        way = " (of an attention with grouped queries one of head and kv_group is searched)" if both else ""
        raise InputError(f"space.granularity: the model has no groups of kind {', '.join(lost)}; it has {had}{way}")


def _check(where: str, multiple_of: Any, max_sparsity: Any) -> None:
    if multiple_of != "auto" and (not isinstance(multiple_of, int) or multiple_of < 1):
        raise InputError(f"{where}.multiple_of must be 'auto' or an integer >= 1, not {multiple_of!r}")
    if not isinstance(max_sparsity, int | float) or not 0 <= max_sparsity <= 1:
        raise InputError(f"{where}.max_sparsity must be between 0 and 1, not {max_sparsity!r}")
