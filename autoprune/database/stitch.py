"""From one candidate to the next on a resident slim model: only what a changed width concerns is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.database.entries import Entry
from autoprune.database.numbers import Cut, Numbers
from autoprune.database.store import LevelDatabase
from autoprune.policy import Policy
from autoprune.structure import Group, Structure
from autoprune.tracing.copies import copied
from autoprune.tracing.masks import digest
from autoprune.tracing.sizes import set_sizes
from autoprune.tracing.slim import absent, named_tensors, set_attributes
from autoprune.tracing.stand_ins import leave_out, modules_of, put_back


@dataclass(frozen=True)
class _Axis:
    """One dimension of one tensor: for every position the index of its atom among all atoms, or the last index."""

    tensor: str
    dim: int
    owner: Tensor


class Stitcher:
    """Holds a resident copy of `model` and turns it into the slim model of one policy after another.

    The level database supplies the consumers' weights, the dense tensors all the rest. Parameters and buffers keep
    their identity, only their data change shape. What repairs or training overwrite must be named by `mark_dirty`.
    Without `compensated` consumers hold the dense weights of what they keep. The modules of absent blocks lie aside.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, database: LevelDatabase, compensated: bool = True
    ) -> None:
        self.structure, self.database, self._compensated = structure, database, compensated
        self.model = copied(model).eval().requires_grad_(False)
        # by their first names alone: under a second one (an alias, a tied weight) a tensor would be renewed twice
        self.dense: dict[str, Tensor] = {n: t.detach() for n, t in named_tensors(model).items()}
        self.live: Mapping[str, Tensor] = named_tensors(self.model)
        self.policy = Policy.dense(structure)
        self._dirty: set[str] = set()
        self._prepare()

    def stitch(self, policy: Policy) -> nn.Module:
        """The resident model at `policy`, in eval mode, without repairs."""
        policy.check(self.structure)
        old, new = dict(self.policy.widths), dict(policy.widths)
        stale = set(self._dirty)
        for name in new:
            if old[name] != new[name]:
                stale |= self._touches[name]
                self._choose(name, new[name])
        self.policy = policy
        with torch.no_grad():
            of = stale if self._compensated else set[str]()
            groups = {group for tensor in of for group in self._compensated_for(tensor)}
            entries = self.database.entries_at({group: new[group] for group in groups}, self.dense)
            for tensor in sorted(stale):
                self.live[tensor].data = self._stored(tensor, self._slice(tensor, self._filled(tensor, entries)), new)
        self._dirty.clear()
        put_back(self.model, self._modules)
        if stale:
            set_attributes(self.model, self.structure)
            set_sizes(self.model, self.structure, new)
        leave_out(self.model, self.absent)
        self.model.eval()
        return self.model

    def mark_dirty(self, tensors: set[str] | None = None) -> None:
        """These tensors (None: all) no longer hold what was stitched and are renewed by the next stitch."""
        self._dirty |= set(self.dense) if tensors is None else tensors

    def kept(self, tensor: str, dim: int) -> Tensor | None:
        """Kept positions of a dimension, ascending, or None where it is whole."""
        for axis in self._axes.get(tensor, ()):
            if axis.dim == dim:
                mask = self._alive[axis.owner]
                return None if bool(mask.all()) else mask.nonzero()[:, 0]
        return None

    def laid_out(self, tensor: str, value: Tensor) -> Tensor:
        """`value` in the memory format of the dense tensor: a model that flattens by `view` runs in no other."""
        like = self.dense[tensor]
        if value.dim() != 4 or like.is_contiguous():
            return value
        return value.contiguous(memory_format=torch.channels_last)

    def narrowed(self) -> frozenset[str]:
        """Names of the tensors that the policy makes smaller than dense."""
        widths = dict(self.policy.widths)
        narrow = [self._touches[g.name] for g in self.structure.groups if widths[g.name] < g.width]
        return frozenset().union(*narrow, *(self._in_block[g.name] for g in self.absent))

    @property
    def absent(self) -> list[Group]:
        """The blocks that the policy leaves out."""
        return absent(self.structure, self.policy.as_dict())

    def rounds(self, tensor: str) -> bool:
        """Whether the policy stores a weight in fewer bits."""
        return self._numbers.rounds(tensor, dict(self.policy.widths))

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Which numbers stay, bool like the cut weight, of the weights that the policy gives zeros."""
        return self._numbers.masks

    def mask_digests(self) -> dict[str, str]:
        """Their hashes, as policy files have them."""
        return {name: digest(mask) for name, mask in sorted(self.masks.items())}

    def _stored(self, tensor: str, value: Tensor, widths: Mapping[str, int]) -> Tensor:
        """The cut weight with its zeros, and rounded, where the policy says so."""
        if tensor not in self._matrices:
            return value
        like = partial(self._cut_alike, tensor)
        return self.laid_out(tensor, self._numbers.held(Cut(tensor, value, partial(self.kept, tensor), like), widths))

    def _cut_alike(self, tensor: str, value: Tensor) -> Tensor:
        """Numbers that belong to those of a dense tensor, where the policy leaves them."""
        return self._slice(tensor, value.view(self.dense[tensor].shape)).contiguous()

    def _prepare(self) -> None:
        atoms = [g for g in self.structure if not g.matrices]
        *ends, total = np.cumsum([0, *(g.width for g in atoms)]).tolist()
        self._starts = starts = dict(zip((g.name for g in atoms), ends, strict=True))
        device = next(iter(self.dense.values())).device
        self._alive = torch.ones(total + 1, dtype=torch.bool, device=device)
        owners: dict[tuple[str, int], Tensor] = {}
        self._blocks = [g for g in self.structure if g.kind == "block"]
        self._modules = modules_of(self.model, self._blocks)
        held = {g.name: set(g.tensors) for g in self.structure}
        self._matrices = frozenset(tensor for g in self.structure for tensor in g.matrices)
        self._numbers = Numbers(self.structure, self.database, self._compensated)
        self._touches: dict[str, set[str]] = {
            g.name: set() if g.kind == "block" else held[g.name] for g in self.structure
        }
        self._in_block = {g.name: held[g.name] for g in self._blocks}
        self._readers: dict[str, list[str]] = {}
        self._biases: dict[str, list[tuple[str, str]]] = {}
        cut = [g for g in self.structure if g.narrows]
        for group in cut:
            for s in group.slices:
                shape = self.dense[s.tensor].shape
                owner = owners.setdefault((s.tensor, s.dim), torch.full((shape[s.dim],), total, dtype=torch.long))
                for atom in range(group.width):
                    positions = s.positions(atom)
                    owner[positions.start : positions.stop] = starts[group.name] + atom
                if s.role == "consume":
                    self._note_reader(group.name, s.tensor)
        self._axes: dict[str, list[_Axis]] = {}
        for (tensor, dim), owner in owners.items():
            self._axes.setdefault(tensor, []).append(_Axis(tensor, dim, owner.to(device)))
        self._dims = {(g.name, s.tensor): s.dim for g in cut for s in g.slices if s.role == "consume"}

    def _note_reader(self, group: str, tensor: str) -> None:
        """A consumer's weight, and its bias, which takes the mean shift, depend on the group's width."""
        readers = self._readers.setdefault(tensor, [])
        if group not in readers:
            readers.append(group)
        bias = tensor.removesuffix("weight") + "bias"
        if bias in self.dense and (group, tensor) not in self._biases.setdefault(bias, []):
            self._biases[bias].append((group, tensor))
            self._touches[group].add(bias)

    def _choose(self, group: str, width: int) -> None:
        if group not in self._starts:
            return
        start, count = self._starts[group], self.structure.group(group).width
        self._alive[start : start + count] = False
        self._alive[start + self.database.keep(group, width).to(self._alive.device)] = True

    def _compensated_for(self, tensor: str) -> list[str]:
        """Groups on whose widths the values of a tensor depend."""
        return self._readers.get(tensor, []) + [group for group, _ in self._biases.get(tensor, [])]

    def _filled(self, tensor: str, entries: Mapping[str, Entry]) -> Tensor:
        """The dense tensor with the compensated columns (or the shifted bias) of every narrowed group in place."""
        value = self.dense[tensor]
        for group in self._readers.get(tensor, ()):
            entry = entries.get(group, {}).get(f"weight|{tensor}")
            if entry is not None:
                value = value.clone() if value is self.dense[tensor] else value
                dim = self._dims[group, tensor]
                value.index_copy_(dim, self._columns(group, tensor, dim), entry.to(value))
        for group, weight in self._biases.get(tensor, ()):
            shift = entries.get(group, {}).get(f"shift|{weight}")
            value = value if shift is None else value + shift.to(value)
        return value

    def _columns(self, group: str, tensor: str, dim: int) -> Tensor:
        """Kept positions of `dim` that belong to `group`."""
        axis = next(a for a in self._axes[tensor] if a.dim == dim)
        start, count = self._starts[group], self.structure.group(group).width
        own = (axis.owner >= start) & (axis.owner < start + count)
        columns: Tensor = (own & self._alive[axis.owner]).nonzero()[:, 0]
        return columns

    def _slice(self, tensor: str, value: Tensor) -> Tensor:
        """Kept positions of every dimension, laid out as the dense tensor, never aliasing it."""
        for axis in self._axes.get(tensor, ()):
            mask = self._alive[axis.owner]
            if not bool(mask.all()):
                value = value.index_select(axis.dim, mask.nonzero()[:, 0])
        value = self.laid_out(tensor, value)
        return value.clone() if value is self.dense[tensor] else value.contiguous() if value.dim() != 4 else value
