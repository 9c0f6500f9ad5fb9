"""What a cut weight holds: which of its numbers stay, and in how many bits, what is left making up for the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from autoprune.database.columns import factors_at
from autoprune.database.entries import Entry
from autoprune.database.factors import Factored
from autoprune.database.masking import Zeros, best, sparse
from autoprune.database.rounding import compensated
from autoprune.database.store import LevelDatabase
from autoprune.structure import Group, Structure
from autoprune.tracing.masks import packed, unpacked
from autoprune.tracing.rounding import Rounded, nearest


@dataclass(frozen=True)
class Cut:
    """A weight as the structured groups leave it.

    `kept` gives the kept positions of a dimension (None: all), `like` cuts another tensor of the dense shape alike.
    """

    name: str
    value: Tensor
    kept: Callable[[int], Tensor | None]
    like: Callable[[Tensor], Tensor]


class Numbers:
    """Makes of cut weights what a policy says that they hold; `masks` are those of the weights that have zeros.

    With `makes_up` by what is left for what goes, else without.
    """

    def __init__(self, structure: Structure, database: LevelDatabase, makes_up: bool) -> None:
        self._database, self._makes_up = database, makes_up
        groups = {kind: [g for g in structure if g.kind == kind] for kind in ("bits", "weight")}
        self._precision = {tensor: g for g in groups["bits"] for tensor in g.matrices}
        self._zeros = {tensor: g for g in groups["weight"] for tensor in g.matrices}
        self._touching: dict[str, list[str]] = {tensor: [] for tensor in (*self._precision, *self._zeros)}
        for g in structure:
            for tensor in g.tensors & self._touching.keys() if g.kind not in ("block", "bits") else ():
                self._touching[tensor].append(g.name)
        self._outputs = {str(op.weight): op.outputs for op in structure.ops}
        self.masks: dict[str, Tensor] = {}

    def rounds(self, tensor: str, widths: Mapping[str, int]) -> bool:
        """Whether a weight is stored in fewer bits."""
        return _narrow(self._precision.get(tensor), widths)

    def held(self, cut: Cut, widths: Mapping[str, int]) -> Tensor:
        """The weight as it is stored."""
        value, name = cut.value, cut.name
        self.masks.pop(name, None)
        if _narrow(self._zeros.get(name), widths):
            entry = self._entry("0", cut, widths, partial(self._masked, cut, widths))
            self.masks[name] = mask = unpacked(entry["mask"], value.shape).to(value.device)
            value = torch.zeros(value.shape).to(value).masked_scatter_(mask, entry["values"].to(value))
        if self.rounds(name, widths):
            bits = self._precision[name]
            entry = self._entry(f"{widths[bits.name]}", cut, widths, partial(self._rounded, cut, value))
            integers, scales = (entry[part].to(value.device) for part in ("integers", "scales"))
            value = Rounded(integers, scales, self._outputs[name]).weight
        return value

    def _entry(self, kind: str, cut: Cut, widths: Mapping[str, int], make: Callable[[], Entry]) -> Entry:
        """An entry of the database by all that decides it."""
        state = [(name, widths[name]) for name in self._touching[cut.name]]
        stem = f"{hashlib.sha256(f'{cut.name}{self._makes_up}{state}'.encode()).hexdigest()[:24]}-{kind}"
        return self._database.entries.get({stem: make})[stem]

    def _masked(self, cut: Cut, widths: Mapping[str, int]) -> Entry:
        group = self._zeros[cut.name]
        zeros = Zeros.of(group, widths[group.name])
        reader, value = self._reader(group, cut.name), cut.value.cpu()
        if reader is not None and _holds_whole_runs(factors := factors_at(reader, cut.kept(reader.reader.dim)), zeros):
            value, mask = sparse(value, reader.reader.kind, factors, zeros)
        else:
            scores = cut.like(self._database.levels[group.name].scores)
            mask = best(scores, zeros, self._outputs[cut.name])
        return {"mask": packed(mask), "values": value[mask].contiguous()}

    def _rounded(self, cut: Cut, value: Tensor) -> Entry:
        reader = self._reader(self._precision[cut.name], cut.name)
        if reader is None:
            found = nearest(value, self._outputs[cut.name])
        else:
            factors = factors_at(reader, cut.kept(reader.reader.dim))
            found = compensated(value.cpu(), reader.reader.kind, factors, zeros=cut.name in self.masks)
        return {"integers": found.integers.cpu().contiguous(), "scales": found.scales.cpu().contiguous()}

    def _reader(self, group: Group, tensor: str) -> Factored | None:
        """What is known of a weight's inputs, where that is to make up for something."""
        reader = self._database.matrix(group.name, tensor)
        return None if reader is None or not self._makes_up or reader.reader.patterned else reader


def _narrow(group: Group | None, widths: Mapping[str, int]) -> bool:
    return group is not None and widths[group.name] < group.width


def _holds_whole_runs(factors: list[tuple[Tensor, Tensor]], zeros: Zeros) -> bool:
    """Whether no run of a pattern lies in two parts of the Gram."""
    return zeros.pattern is None or len(factors) == 1
