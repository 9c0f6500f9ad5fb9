"""What can be pruned in a model, as data: slices, groups, operations and the frozen parts. No torch here."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from autoprune.errors import InputError, did_you_mean

Role = Literal["produce", "carry", "consume"]
FINGERPRINT_VERSION = 5
"""To be raised whenever the same model gets another fingerprint: more is found in it, or more of it is hashed."""
Kind = Literal["channel", "head", "kv_group", "neuron", "block", "bits", "weight"]
Gives = Literal["zero", "input"]
SHAPELESS = ("bits", "weight")
"""Kinds that leave the shapes of their weights."""
MAY_BE_EMPTY = ("sizes", "stands", "matrices", "pattern")
"""Fields of a group that its fingerprint knows only where they say something."""
PATTERN = re.compile(r"[1-9]\d*:[1-9]\d*")


@dataclass(frozen=True, slots=True)
class Slice:
    """One place that shrinks with an atom: positions of dimension `dim` of the tensor called `tensor`.

    Atom i in [first, first + count) owns the positions offset + (i - first) * stride + [0, repeat). `produce`
    writes the group's activations, `carry` passes them on (norms, depthwise weights), `consume` reads them.
    """

    tensor: str
    dim: int
    role: Role
    offset: int = 0
    stride: int = 1
    repeat: int = 1
    first: int = 0
    count: int | None = None

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise InputError(f"slice of {self.tensor!r}: role must be one of {get_args(Role)}, not {self.role!r}")
        if min(self.dim, self.offset, self.first) < 0 or min(self.stride, self.repeat) < 1:
            raise InputError(f"slice of {self.tensor!r}: dim, offset and first must be >= 0, stride and repeat >= 1")
        if self.count is not None and self.count < 1:
            raise InputError(f"slice of {self.tensor!r}: count must be >= 1, not {self.count}")

    def positions(self, atom: int) -> range:
        """Positions of `dim` that `atom` owns; empty where the slice does not hold the atom."""
        if atom < self.first or (self.count is not None and atom >= self.first + self.count):
            return range(0)
        start = self.offset + (atom - self.first) * self.stride
        return range(start, start + self.repeat)


@dataclass(frozen=True, slots=True)
class Size:
    """A whole number in a module by which its forward cuts channels (`x[:, : self.width]`): it counts atoms.

    `attribute` is the path of the module and the name of the number, or of the list or tuple in which it is number
    `index`; `value` is what it is in the dense model. Every atom that goes makes it smaller by `each`.
    """

    attribute: str
    value: int
    index: int | None = None
    each: int = 1

    def __post_init__(self) -> None:
        if min(self.value, self.each) < 1 or (self.index is not None and self.index < 0):
            raise InputError(f"size {self.attribute!r}: value and each must be >= 1, index >= 0")


@dataclass(frozen=True, slots=True)
class Stand:
    """What stands in a module's place where its block is absent: it gives zeros like its input, or that input.

    The input is the first tensor that it is called with; the original returned a tensor, or a tuple of so many
    `results`, of which all but the first are None then.
    """

    module: str
    gives: Gives
    results: int = 0

    def __post_init__(self) -> None:
        if self.gives not in get_args(Gives) or self.results < 0:
            raise InputError(f"stand for {self.module!r}: gives one of {get_args(Gives)}, results must be >= 0")


@dataclass(frozen=True, slots=True)
class Group:
    """Parameter slices that must shrink together; `width` atoms in the dense model, `grid` the allowed widths.

    `sizes` are the numbers in the model's modules that follow the width. A block is one atom, all tensors of the
    modules that `stands` takes the place of: those that it consumes make its branch zero where they are zero. Kinds
    without slices leave the shapes of the weights called `matrices`: a precision (kind `bits`), whose width is the bits
    of a number in them, and the zeros of a single one (kind `weight`), whose width is how many numbers of the dense
    weight are not zero; under a `pattern` "n:m" that is n of every m inputs that lie side by side.
    """

    name: str
    kind: Kind
    width: int
    slices: tuple[Slice, ...]
    grid: tuple[int, ...]
    sizes: tuple[Size, ...] = ()
    stands: tuple[Stand, ...] = ()
    matrices: tuple[str, ...] = ()
    pattern: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"group {self.name!r}: kind must be one of {get_args(Kind)}, not {self.kind!r}")
        ascending = all(a < b for a, b in zip(self.grid, self.grid[1:], strict=False))
        if not self.grid or not ascending or self.grid[-1] != self.width or self.grid[0] < 0:
            raise InputError(f"group {self.name!r}: the grid must ascend to the width {self.width}, not {self.grid}")
        if self.kind == "block" and (self.width != 1 or not self.stands):
            raise InputError(f"group {self.name!r}: a block is one atom, with stands for its modules")
        if (self.kind in SHAPELESS) != bool(self.matrices) or (self.matrices and self.slices):
            raise InputError(f"group {self.name!r}: bits and weights have matrices and no slices, any other kind none")
        if self.kind == "weight" and len(self.matrices) != 1:
            raise InputError(f"group {self.name!r}: its width counts the weights of one matrix, not {self.matrices}")
        if self.pattern and (self.kind != "weight" or not PATTERN.fullmatch(self.pattern)):
            raise InputError(f"group {self.name!r}: a pattern is n:m, of a group of weights, not {self.pattern!r}")

    @property
    def narrows(self) -> bool:
        """Whether tensors get narrower by its atoms; blocks go as a whole, bits and weights leave every shape."""
        return self.kind != "block" and not self.matrices

    @property
    def tensors(self) -> frozenset[str]:
        """Names of all tensors that its width concerns."""
        return frozenset((*(s.tensor for s in self.slices), *self.matrices))

    def check(self, width: int) -> None:
        """Raise InputError unless `width` is on the grid."""
        if width not in self.grid:
            raise InputError(f"group {self.name!r} cannot be {width} wide; its grid is {self.grid}")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dense shape and bytes an element of one parameter or buffer."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    is_parameter: bool = True


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of the cost polynomial: MACs a sample = positions * numel(weight) at the current widths.

    `positions` sums over all calls in one forward pass: output positions of a conv, input positions of a transposed
    conv, rows of a linear; an operation without a weight has `weight=None` and `positions` MACs, constant or, where it
    names groups, in proportion to the width of each (the products of an attention to its heads and to its block).
    `tensors` are the parameters and buffers that the module owns; each tensor belongs to exactly one Op. `outputs` is
    the dimension of the weight that counts its outputs.
    """

    name: str
    type: str
    depth: int
    positions: int = 0
    weight: str | None = None
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    spatial: tuple[int, ...] = ()
    tensors: tuple[TensorSpec, ...] = ()
    groups: tuple[str, ...] = ()
    outputs: int = 0

    def __post_init__(self) -> None:
        if self.outputs not in (0, 1):
            raise InputError(f"operation {self.name!r}: outputs is dimension 0 or 1 of its weight, not {self.outputs}")


@dataclass(frozen=True, slots=True)
class Structure:
    """All groups (in execution order), the operations that cost, and what was frozen with a reason in a user's words.

    `frozen` maps a module name to its reason. `fingerprint` identifies the dense structure ("sha256:.."). `inside` has
    for every block that holds other groups as a whole its index and theirs.
    """

    groups: tuple[Group, ...]
    ops: tuple[Op, ...]
    frozen: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    inside: tuple[tuple[int, tuple[int, ...]], ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        names = [g.name for g in self.groups]
        if len(set(names)) != len(names):
            raise InputError(f"group names must be unique, not {names}")
        object.__setattr__(self, "frozen", MappingProxyType(dict(self.frozen)))
        object.__setattr__(self, "fingerprint", self.fingerprint or _fingerprint(self.groups, self.ops))
        object.__setattr__(self, "inside", tuple(_inside(self.groups)))

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(g.name for g in self.groups)

    def group(self, name: str) -> Group:
        """The group called `name`; InputError with the nearest name where there is none."""
        for g in self.groups:
            if g.name == name:
                return g
        raise InputError(f"unknown group {name!r}; {did_you_mean(name, self.names)}")

    def __reduce__(self) -> Any:  # a MappingProxyType does not pickle, and workers need the structure
        return (Structure, (self.groups, self.ops, dict(self.frozen), self.fingerprint))


def _inside(groups: tuple[Group, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Outer blocks first; a block may lie in another."""
    tensors = [g.tensors for g in groups]
    blocks = [i for i, g in enumerate(groups) if g.kind == "block"]
    for i in sorted(blocks, key=lambda i: (-len(tensors[i]), i)):
        inside = (j for j, own in enumerate(tensors) if own < tensors[i] or (j not in blocks and own == tensors[i]))
        if held := tuple(inside):
            yield i, held


def _fingerprint(groups: tuple[Group, ...], ops: tuple[Op, ...]) -> str:
    """Hash of everything that decides which atoms a width means; the grid is the job's choice, so it is left out."""
    plain = [{k: v for k, v in asdict(g).items() if k != "grid" and (v or k not in MAY_BE_EMPTY)} for g in groups]
    what = [plain, [{k: v for k, v in asdict(o).items() if k != "outputs"} for o in ops]]  # its class tells that
    return "sha256:" + hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
