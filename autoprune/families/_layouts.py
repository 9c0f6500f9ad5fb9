"""How attention and feed-forward layers lie in their tensors: the groups of one layer, from the names of its parts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from autoprune.structure import Group, Kind, Role, Size, Slice, Stand
from autoprune.tracing.blocks import block_group

Layout = str
"""Of a fused projection: "thirds" (all queries, all keys, all values) or "by head" (query, key and value of each)."""


@dataclass(frozen=True, slots=True)
class Heads:
    """One attention: paths of its parts below the module called `at`, and how many heads of which size it has.

    With `fused` one layer makes queries, keys and values, as `layout` says. `queries` are the query heads of one
    key-value head. `numbers` are whole numbers of modules (path below `at`) that count what the heads hold; each goes
    down in proportion; `within_numbers` are those that count query heads of one key-value head. `tables` are parameters
    that hold a value a head along their last dimension, biases by position.
    """

    at: str
    out: str
    heads: int
    head_dim: int
    q: str = ""
    k: str = ""
    v: str = ""
    fused: str = ""
    layout: Layout = "thirds"
    queries: int = 1
    numbers: tuple[str, ...] = ()
    within_numbers: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tied:
    """Attentions whose heads go together, for they share what is added to their scores."""

    heads: tuple[Heads, ...]


@dataclass(frozen=True, slots=True)
class Neurons:
    """One feed-forward layer: paths of `up` (several where it is gated) and `down` below the module called `at`.

    With `halves` the one layer in `up` makes gate and value, one behind the other.
    """

    at: str
    up: tuple[str, ...]
    down: str
    numbers: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    halves: bool = False


@dataclass(frozen=True, slots=True)
class Branch:
    """A residual branch that may go as a whole: an attention or a feed-forward layer with the norm in front of it.

    `stands` has paths below the module called `at`; `out` are the layers, below `at` too, with whose weights the branch
    ends.
    """

    at: str
    name: str
    stands: tuple[Stand, ...]
    out: tuple[str, ...]


Part = Heads | Tied | Neurons | Branch


def branch(at: str, zero: str, out: str, *, norm: str = "", results: int = 0) -> Branch:
    """The branch in which the module `zero` follows `norm`, where there is one, and ends with the layer `out` in it."""
    before = (Stand(norm, "input"),) if norm else ()
    return Branch(at, zero, (*before, Stand(zero, "zero", results)), (out,))


def is_class(module: nn.Module, package: str, names: Collection[str]) -> bool:
    """Whether a module is of a class of `package` that is called one of `names`, or of one that is made from it."""
    return any(kind.__module__.split(".")[0] == package and kind.__name__ in names for kind in type(module).__mro__)


def head_group(model: nn.Module, some: Sequence[Heads], kinds: Sequence[str]) -> Group | None:
    """The group of one attention, or of several whose heads go together; None where they have but one.

    Under grouped queries it is that of kind `kv_group`, unless only `head` is among `kinds`: then atom i is query head
    i of every key-value head.
    """
    first = some[0]
    grouped = first.queries > 1
    within = grouped and "head" in kinds and "kv_group" not in kinds
    width = first.queries if within else first.heads // first.queries
    kind: Kind = "kv_group" if grouped and not within else "head"
    if width < 2:
        return None
    modules = dict(model.named_modules())
    if within and (first.fused or any(one.tables for one in some)):
        return None
    slices = [s for one in some for s in (_within(one, modules) if within else _whole(one, modules))]
    slices += [_table(model, _path(one.at, table)) for one in some for table in one.tables]
    ordered = sorted(slices, key=lambda s: ("produce", "carry", "consume").index(s.role))
    counts = [one.within_numbers if within else (*one.numbers, *_lengths(one)) for one in some]
    sizes = tuple(s for one, paths in zip(some, counts, strict=True) for s in _numbers(model, one.at, paths, width))
    first_tensor = slices[0].tensor
    name = first_tensor.rpartition(".")[0] or first_tensor
    return Group(name, kind, width, tuple(ordered), tuple(range(1, width + 1)), sizes)


def neuron_group(model: nn.Module, one: Neurons) -> Group | None:
    """The group of a feed-forward layer."""
    modules = dict(model.named_modules())
    up = [_path(one.at, path) for path in one.up]
    width = modules[up[0]].weight.shape[_made_along(modules[up[0]])] // (2 if one.halves else 1)
    slices = list(_rows(modules, up[0], width, 1, 0))
    if one.halves:
        slices += _rows(modules, up[0], width, 1, width)
    for other in up[1:]:
        slices += _rows(modules, other, width, 1, 0)
    for path in one.between:
        for name, tensor in modules[_path(one.at, path)].named_parameters(recurse=False):
            if tensor.dim() and tensor.shape[0] == width:
                slices.append(Slice(f"{_path(one.at, path)}.{name}", 0, "carry"))
    slices.append(_columns(modules, _path(one.at, one.down), 1, 0, 1))
    sizes = _numbers(model, one.at, one.numbers, width)
    return Group(up[0], "neuron", width, tuple(slices), tuple(range(1, width + 1)), sizes) if width > 1 else None


def branch_group(model: nn.Module, one: Branch) -> Group | None:
    """The group of a branch: a block; None where it holds what is used elsewhere too."""
    stands = [replace(s, module=_path(one.at, s.module)) for s in one.stands]
    return block_group(model, _path(one.at, one.name), stands, [_path(one.at, out) for out in one.out])


def _whole(one: Heads, modules: Mapping[str, nn.Module]) -> Iterator[Slice]:
    """A key-value head with its query heads is an atom."""
    width, hd, many = one.heads // one.queries, one.head_dim, one.queries * one.head_dim
    if one.fused:
        path = _path(one.at, one.fused)
        if one.layout == "by head":
            yield from _rows(modules, path, width, 3 * hd, 0)
        else:
            for offset, repeat in ((0, many), (width * many, hd), (width * (many + hd), hd)):
                yield from _rows(modules, path, width, repeat, offset)
    else:
        for part, repeat in ((one.q, many), (one.k, hd), (one.v, hd)):
            yield from _rows(modules, _path(one.at, part), width, repeat, 0)
    yield _columns(modules, _path(one.at, one.out), many, 0, many)


def _within(one: Heads, modules: Mapping[str, nn.Module]) -> Iterator[Slice]:
    """The same query head of every key-value head is an atom."""
    hd, path = one.head_dim, _path(one.at, one.q or one.fused)
    for number in range(one.heads // one.queries):
        yield from _rows(modules, path, one.queries, hd, number * one.queries * hd)
    for number in range(one.heads // one.queries):
        yield _columns(modules, _path(one.at, one.out), hd, number * one.queries * hd, hd)


def _rows(
    modules: Mapping[str, nn.Module], path: str, width: int, repeat: int, offset: int, role: Role = "produce"
) -> Iterator[Slice]:
    """What makes `width` atoms of `repeat` outputs each: the weight and the bias of the layer at `path`."""
    if path not in modules:  # parameters of a module itself: in_proj_weight, in_proj_bias
        owner, _, name = path.rpartition(".")
        held = dict(modules[owner].named_parameters(recurse=False))
        for own in (f"{name}_weight", f"{name}_bias"):
            if own in held:
                yield Slice(f"{owner}.{own}" if owner else own, 0, role, offset, repeat, repeat, 0, width)
        return
    layer = modules[path]
    yield Slice(f"{path}.weight", _made_along(layer), role, offset, repeat, repeat, 0, width)
    if getattr(layer, "bias", None) is not None:
        yield Slice(f"{path}.bias", 0, role, offset, repeat, repeat, 0, width)


def _columns(modules: Mapping[str, nn.Module], path: str, stride: int, offset: int, repeat: int) -> Slice:
    return Slice(f"{path}.weight", 1 - _made_along(modules[path]), "consume", offset, stride, repeat)


def _made_along(layer: nn.Module) -> int:
    """The dimension of the weight along which its outputs lie: 1 in GPT-2's Conv1D."""
    return 1 if type(layer).__name__ == "Conv1D" else 0


def _table(model: nn.Module, path: str) -> Slice:
    return Slice(path, model.get_parameter(path).dim() - 1, "carry")


def _lengths(one: Heads) -> tuple[str, ...]:
    """Where GPT-2's Conv1D keeps how many outputs it has."""
    return tuple(f"{path}.nf" for path in (one.q, one.k, one.v, one.fused) if path)


def _numbers(model: nn.Module, at: str, paths: Sequence[str], width: int) -> tuple[Size, ...]:
    """Numbers that are there and that `width` divides; others count something else."""
    found = []
    for path in paths:
        where, _, name = _path(at, path).rpartition(".")
        value = vars(model.get_submodule(where)).get(name) if _is_there(model, where) else None
        if type(value) is int and value and value % width == 0:
            found.append(Size(f"{where}.{name}" if where else name, value, None, value // width))
    return tuple(found)


def _is_there(model: nn.Module, path: str) -> bool:
    return not path or path in dict(model.named_modules(remove_duplicate=False))


def _path(at: str, path: str) -> str:
    return f"{at}.{path}" if at else path
