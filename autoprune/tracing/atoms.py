"""Closures -> atoms -> affine slices: which positions of which tensors go together, or why that cannot be said."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from autoprune.structure import Group, Role, Size, Slice
from autoprune.tracing.couple import Closure, Reach, Side
from autoprune.tracing.sizes import number_at
from autoprune.tracing.slim import named_tensors
from autoprune.tracing.spread import IntArray
from autoprune.tracing.watch import is_depthwise, is_producer, multiplies

ROLES: Mapping[Side, Role] = {"out": "produce", "in": "consume", "carry": "carry"}
Atoms = dict[int, IntArray]
"""Atoms that are laid out alike: axis index -> their positions, ascending, [atoms, positions of one]."""

MOST_RUNS = 8
"""Parts with steps of their own into which channels that meet the same layers may fall."""

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True, slots=True)
class Axis:
    """One side of a module, or one dimension of a raw parameter, as a row of `size` positions.

    `lost` names the operation behind which nobody knows where the channels go; its size is 0.
    """

    name: str
    side: Side
    size: int
    dim: int | None = None
    lost: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Channels that hang together and are laid out alike: a group, or (`group` is None) the reason why not.

    `modules` are all that the channels touch, `producers` those that make them, first executed first; `related` are
    the producers of all candidates that have a producer in common, directly or over others.
    """

    name: str
    width: int
    producers: tuple[str, ...]
    modules: tuple[str, ...]
    related: tuple[str, ...]
    group: Group | None
    reason: str = ""


def candidates(model: nn.Module, closures: Sequence[Closure], order: Mapping[str, int]) -> tuple[Candidate, ...]:
    """All candidates, in execution order of their first producer. `order` ranks the modules by their first call."""
    modules = dict(model.named_modules())
    axes = _axes(model, closures)
    owned = _components(modules, axes, closures)
    late = len(order)
    makers = {a: (order.get(axis.name, late), axis.name) for a, axis in enumerate(axes) if axis.side == "out"}
    made = [atoms for atoms in owned if any(a in makers for a in atoms)]
    alike = [run for atoms in made for run in _runs(atoms, _maker(atoms, makers))]
    names = {id(t): n for n, t in named_tensors(model).items()}
    relatives = _relatives([{axes[a].name for a in atoms if a in makers} for atoms in alike])
    ordered = sorted(alike, key=lambda atoms: _rank(atoms, makers))
    makes = [sorted((a for a in atoms if a in makers), key=makers.__getitem__) for atoms in ordered]
    labels = numbered([axes[producers[0]].name for producers in makes])
    found = []
    for label, atoms, producers in zip(labels, ordered, makes, strict=True):
        group, reason = _group(label, atoms, axes, modules, names)
        touched = tuple(dict.fromkeys(axes[a].name for a in atoms if axes[a].side != "size"))
        made_by = tuple(axes[a].name for a in producers)
        width = len(atoms[producers[0]])
        found.append(Candidate(label, width, made_by, touched, relatives[made_by[0]], group, reason))
    return tuple(found)


def numbered(names: Sequence[str]) -> list[str]:
    """The same names, those that come again with #2, #3; a module may itself be called like that."""
    labels: list[str] = []
    for name in names:
        numbers = (f"{name}#{i}" for i in range(2, len(names) + 2))
        free = (label for label in numbers if label not in {*labels, *names})
        labels.append(next(free) if name in labels else name)
    return labels


def _relatives(families: Sequence[set[str]]) -> dict[str, tuple[str, ...]]:
    """Producer -> all producers that it meets in one of `families`, directly or over others."""
    joined: list[set[str]] = []
    for family in families:
        apart = [other for other in joined if other.isdisjoint(family)]
        joined = [*apart, set(family).union(*(other for other in joined if not other.isdisjoint(family)))]
    return {name: tuple(sorted(family)) for family in joined for name in family}


def _maker(atoms: Atoms, makers: Mapping[int, tuple[int, str]]) -> int:
    return min((a for a in atoms if a in makers), key=makers.__getitem__)


def _rank(atoms: Atoms, makers: Mapping[int, tuple[int, str]]) -> tuple[int, int]:
    first = _maker(atoms, makers)
    return makers[first][0], int(atoms[first].min())


def _runs(atoms: Atoms, maker: int) -> list[Atoms]:
    """Atoms in the order in which `maker` makes them, cut where they go on at another step: parts of a split.

    Whole where that would be a patchwork.
    """
    order = np.argsort(atoms[maker][:, 0], kind="stable")
    atoms = {a: table[order] for a, table in atoms.items()}
    steps = np.concatenate([np.diff(table, axis=0) for table in atoms.values()], 1)
    cuts, start = [0], 0
    for i in range(1, len(order)):
        if (steps[i - 1] != steps[start]).any():
            cuts.append(i)
            start = min(i, len(steps) - 1)
    sizes = np.diff([*cuts, len(order)])
    if len(cuts) == 1 or len(cuts) > MOST_RUNS or sizes.min() < 2:
        return [atoms]
    return [{a: table[i : i + n] for a, table in atoms.items()} for i, n in zip(cuts, sizes, strict=True)]


def _axes(model: nn.Module, found: Sequence[Closure]) -> list[Axis]:
    modules, tensors = dict(model.named_modules()), named_tensors(model)
    axes: dict[Axis, None] = {}
    for closure in found:
        for reach in closure.reaches:
            if reach.side == "size":
                axes[Axis(reach.name, "size", number_at(model, reach.name, reach.dim) or 0, reach.dim)] = None
            else:
                axes[_axis(reach, modules, tensors)] = None
    return list(axes)


def _axis(reach: Reach, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> Axis:
    if reach.lost:
        return Axis(reach.name, reach.side, 0, None, reach.lost)
    if reach.dim is not None:
        return Axis(reach.name, reach.side, int(tensors[reach.name].shape[reach.dim]), reach.dim)
    return Axis(reach.name, reach.side, axis_size(modules[reach.name], reach.side))


def axis_size(module: nn.Module, side: str) -> int:
    """Channels on a side of a module; 0 for a module whose channels this file cannot place."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels if side == "in" else module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features if side == "in" else module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings if side == "in" else module.embedding_dim
    if isinstance(module, NORMS):
        return int(module.num_features)
    if isinstance(module, nn.GroupNorm):
        return int(module.num_channels) if module.affine else 0
    if isinstance(module, nn.PReLU):
        return int(module.num_parameters)
    return 0


def _components(modules: Mapping[str, nn.Module], axes: Sequence[Axis], found: Sequence[Closure]) -> list[Atoms]:
    """Atoms, those that are alike together: connected components of the relation "goes together"."""
    index = {(axis.name, axis.side, axis.dim): i for i, axis in enumerate(axes)}
    sizes = [max(axis.size, 1) for axis in axes]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    left, right = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for closure in found:
        root = index[closure.root, closure.side, closure.dim]
        for reach in closure.reaches:
            a = index[reach.name, reach.side, reach.dim]
            if 1 in (axes[a].size, axes[root].size):  # one channel is broadcast to many, it does not go with them
                continue
            positions, roots = reach.positions, reach.roots
            if axes[a].size == 0:  # a module that cannot be narrowed: one mark that the channels touch it
                positions = np.zeros_like(positions)
            inside = positions < sizes[a]  # beyond it the coupling is wrong; certification will tell
            left.append(starts[root] + roots[inside])
            right.append(starts[a] + positions[inside])
    for a, axis in enumerate(axes):
        period = _period(modules.get(axis.name), axis.side) if axis.dim is None else axis.size
        p = np.arange(axis.size, dtype=np.int64)
        left.append(starts[a] + p)
        right.append(starts[a] + (p % period if period else p))
    n, one, two = int(starts[-1]), np.concatenate(left), np.concatenate(right)
    _, label = connected_components(coo_matrix((np.ones(len(one), bool), (one, two)), shape=(n, n)), directed=False)
    return _split(label, np.repeat(np.arange(len(axes)), sizes), starts)


def _split(label: IntArray, axis_of: IntArray, starts: IntArray) -> list[Atoms]:
    """Atoms that touch the same axes with as many positions each, by the first of them; an atom is one `label`."""
    if len(label) == 0:  # no layer whose channels could be anyone's
        return []
    order = np.lexsort((np.arange(len(label)), axis_of, label))
    label, axis = label[order], axis_of[order]
    positions = order - starts[axis]
    fresh = np.ones(len(order), bool)  # where another axis of an atom, or another atom, begins
    fresh[1:] = (np.diff(label) != 0) | (np.diff(axis) != 0)
    at = np.nonzero(fresh)[0]
    runs = np.stack([axis[at], np.diff(np.append(at, len(order)))], 1)
    firsts = np.nonzero(np.diff(label[at], prepend=-1))[0]
    alike: dict[bytes, list[int]] = defaultdict(list)
    for first, last in zip(firsts, np.append(firsts[1:], len(at)), strict=True):
        alike[runs[first:last].tobytes()].append(int(first))
    found = []
    for key, members in alike.items():
        sizes = np.frombuffer(key, runs.dtype).reshape(-1, 2)
        found.append(
            {int(a): positions[at[np.array(members) + i][:, None] + np.arange(n)] for i, (a, n) in enumerate(sizes)}
        )
    return found


def _period(module: nn.Module | None, side: str) -> int:
    """Channels of one conv group on this side; all conv groups stay alike, so positions a period apart go together."""
    if not isinstance(module, nn.modules.conv._ConvNd) or module.groups == 1 or is_depthwise(module):
        return 0
    if multiplies(module):  # what goes with what is made of it: `probe` says so
        return 0
    return (module.in_channels if side == "in" else module.out_channels) // module.groups


def _group(
    name: str,
    atoms: Atoms,
    axes: Sequence[Axis],
    modules: Mapping[str, nn.Module],
    names: Mapping[int, str],
) -> tuple[Group | None, str]:
    slices: dict[tuple[object, ...], Slice] = {}
    sizes = [
        Size(axes[a].name, axes[a].size, axes[a].dim, t.shape[1]) for a, t in atoms.items() if axes[a].side == "size"
    ]
    for a in sorted((a for a in atoms if axes[a].side != "size"), key=lambda a: axes[a].side == "in"):
        if axes[a].lost:
            return None, f"the trace cannot follow its channels through {axes[a].lost}"
        if axes[a].size == 0:
            return None, ""  # `reasons` knows the module
        for tensor, dim, role, period in _places(axes[a], modules, names):
            rows = [np.unique(row % period) for row in atoms[a]] if period else atoms[a]
            found = _affine(rows, tensor, dim, role)
            if found is None:
                return None, f"its channels are not laid out regularly in {tensor!r}"
            # a tied tensor may be written and read along one dimension, which shrinks once: the reader wins
            slices.update(((s.tensor, s.dim, s.offset, s.stride, s.repeat), s) for s in found)
    width = len(next(iter(atoms.values())))
    return Group(name, "channel", width, tuple(slices.values()), tuple(range(1, width + 1)), tuple(sizes)), ""


def _places(
    axis: Axis, modules: Mapping[str, nn.Module], names: Mapping[int, str]
) -> Iterable[tuple[str, int, Role, int]]:
    """(tensor, dim, role, period) of every tensor along an axis; period is 0 but within a grouped conv's weight."""
    if axis.dim is not None:
        return [(axis.name, axis.dim, ROLES[axis.side], 0)]
    module = modules[axis.name]
    role = ROLES[axis.side]
    period = _period(module, axis.side)
    weight_dim = 1 if axis.side == "in" else 0
    if isinstance(module, nn.modules.conv._ConvNd) and module.transposed and is_producer(module):
        weight_dim = 1 - weight_dim
    if isinstance(module, nn.Embedding):
        weight_dim = 1 - weight_dim
    places: list[tuple[str, int, Role, int]] = []
    for attribute in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(module, attribute, None)
        if not isinstance(tensor, Tensor) or id(tensor) not in names or (axis.side == "in" and attribute != "weight"):
            continue
        dim = weight_dim if attribute == "weight" else 0
        # dimension 1 of a grouped conv's weight (0 where transposed) counts within one conv group
        inner = 1 if attribute == "weight" else -1
        places.append((names[id(tensor)], dim, role, period if dim == inner else 0))
    return places


def _affine(rows: Sequence[IntArray] | IntArray, tensor: str, dim: int, role: Role) -> list[Slice] | None:
    """Slices in which atom i owns `rows[i]`, each offset + i * stride + [0, repeat); None if there are none."""
    if not isinstance(rows, np.ndarray) and len({len(row) for row in rows}) != 1:
        return None
    table = np.asarray(rows)
    steps = np.diff(table, axis=0)
    if len(rows) > 1 and ((steps != steps[0]).any() or (steps[0] < 1).any()):
        return None
    columns = table[0]
    strides = steps[0] if len(rows) > 1 else np.full(len(columns), len(columns), np.int64)
    slices: list[Slice] = []
    start = 0
    for end in range(1, len(columns) + 1):
        joined = end < len(columns) and columns[end] == columns[end - 1] + 1 and strides[end] == strides[start]
        # one slice may hold a run of neighbours only as long as the next atom does not begin inside it
        if not joined or end - start >= strides[start]:
            slices.append(Slice(tensor, dim, role, int(columns[start]), int(strides[start]), end - start))
            start = end
    return slices
