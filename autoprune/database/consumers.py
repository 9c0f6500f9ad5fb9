"""The weights that read a group, in matrix form with the group's own columns: what compensation works on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.database.grams import Gram
from autoprune.database.zeros import patterned
from autoprune.structure import Group
from autoprune.tracing.calls import from_matrix, kept_dim, to_matrix
from autoprune.tracing.wiring import Site, batch_norms

LARGEST = 8192
"""Columns of a Gram that are kept whole: 512 MB in float64."""


@dataclass(frozen=True)
class Reader:
    """How a weight reads one group: positions [atoms, positions of an atom] of its dimension `dim`.

    `bias` takes the mean shift; `patterned`: its zeros stay, so that it is not compensated.
    """

    weight: str
    kind: str
    groups: int
    kernel: tuple[int, ...]
    dim: int
    bias: str | None
    patterned: bool
    positions: Tensor

    @property
    def block(self) -> int:
        """Columns of one atom."""
        return self.positions.shape[1] * math.prod(self.kernel)

    def matrix(self, weight: Tensor) -> Tensor:
        """The group's columns of `weight`: [conv groups, rows, atoms * block], an atom's side by side."""
        matrix = to_matrix(weight, self.kind, self.groups)
        return matrix.flatten(2)[:, :, self.columns(matrix.shape[3]).to(weight.device)]

    def columns(self, channels: int) -> Tensor:
        """Where the group's columns lie in a matrix of all `channels` inputs of a conv group, tap by tap."""
        taps = torch.arange(math.prod(self.kernel)) * channels
        return (taps + self.positions[:, :, None]).flatten()

    def native(self, matrix: Tensor, kept: Tensor) -> Tensor:
        """Columns of the kept atoms of `matrix` as a weight, restricted to their positions in ascending order."""
        groups, count, _ = matrix.shape
        taps = math.prod(self.kernel)
        w = matrix.unflatten(2, (*self.positions.shape, taps))[:, :, kept].flatten(2, 3)
        w = w[:, :, self.positions[kept].flatten().argsort()]
        return from_matrix(w.transpose(2, 3).reshape(groups, count, taps, -1), self.kind, self.kernel)


@dataclass(frozen=True)
class Consumer:
    """One weight restricted to the columns of some `atoms` of one group, ascending; nearly always of all.

    matrix: float64 [conv groups, rows, atoms * block], the block of an atom side by side (its positions, then taps);
    second: the Gram of those columns; mean: [conv groups, atoms * block]; share: [conv groups, rows], the weight of
    each output row in the error, already divided by the output energy.
    """

    reader: Reader
    atoms: Tensor
    matrix: Tensor
    second: Tensor
    mean: Tensor
    share: Tensor

    @property
    def block(self) -> int:
        """Columns of one atom."""
        return self.reader.block


def consumed(groups: Sequence[Group], sites: Mapping[str, Site]) -> dict[str, list[str]]:
    """For every group the conv and linear weights that read it; none for blocks, which nothing can make up for."""
    read = {g.name: [s for s in g.slices if s.role == "consume" and g.narrows] for g in groups}
    return {name: sorted({s.tensor for s in slices if s.tensor in sites}) for name, slices in read.items()}


def in_matrices(groups: Sequence[Group], sites: Mapping[str, Site]) -> dict[str, list[str]]:
    """For every group of matrices its weights whose inputs are known; of grouped convolutions nobody asks for them."""
    return {g.name: [n for n in g.matrices if n in sites and sites[n].groups == 1] for g in groups if g.matrices}


def matrices_of(
    model: nn.Module, group: Group, names: Sequence[str], sites: Mapping[str, Site], grams: Mapping[str, Gram]
) -> list[Consumer]:
    """The weights called `names` of a group of matrices, each with all of its channels as atoms."""
    found = []
    for name in names:
        site, weight = sites[name], model.get_parameter(name).detach()
        channels = to_matrix(weight.to("meta"), site.kind, site.groups).shape[3]
        dim = 1 - kept_dim(site.kind)
        positions = torch.arange(channels)[:, None]
        kernel = tuple(weight.shape[2:])
        reader = Reader(name, site.kind, site.groups, kernel, dim, site.bias, patterned(weight), positions)
        found += _consumers(model, reader, site, grams[name])
    return found


def consumers_of(
    model: nn.Module, group: Group, names: Sequence[str], sites: Mapping[str, Site], grams: Mapping[str, Gram]
) -> list[Consumer]:
    """The consumers called `names` of `group` with the Gram blocks of its columns (ALGORITHMS 2.3)."""
    weights = dict(model.named_parameters())
    found = []
    for name in names:
        reader = _reader(group, sites[name], weights[name].detach())
        found += _consumers(model, reader, sites[name], grams[name])
    return found


def _consumers(model: nn.Module, reader: Reader, site: Site, gram: Gram) -> list[Consumer]:
    """One weight as `reader` reads it, a consumer for each block of its Gram."""
    weight, found = model.get_parameter(reader.weight).detach(), []
    matrix = to_matrix(weight, site.kind, site.groups)
    columns = reader.columns(matrix.shape[3]).to(weight.device).view(len(reader.positions), -1)
    share = norm_scale(model, site).expand(matrix.shape[0] * matrix.shape[1])
    share = share / (share * gram.energy).sum().clamp_min(1e-30)
    own, share = reader.matrix(weight).double(), share.view(matrix.shape[0], -1)
    for held, second in zip(gram.columns, gram.seconds, strict=True):
        atoms = torch.isin(columns[:, 0], held).nonzero()[:, 0]
        if len(atoms):
            kept = columns[atoms].flatten()
            place = torch.searchsorted(held, kept)
            part = own.unflatten(2, columns.shape)[:, :, atoms].flatten(2)
            found.append(Consumer(reader, atoms.cpu(), part, second[:, place][:, :, place], gram.mean[:, kept], share))
    return found


def norm_scale(model: nn.Module, site: Site) -> Tensor:
    """How the squares of a weight's outputs grow in the batch norm that alone reads them, float64 [outputs] or []."""
    device = next(iter(model.parameters())).device
    if site.norm is None:
        return torch.ones((), dtype=torch.float64, device=device)
    bn = batch_norms(model)[site.norm]
    assert bn.running_var is not None
    scale = bn.weight.detach() if bn.weight is not None else 1.0
    return (scale * (bn.running_var + bn.eps).rsqrt()).double().square()


def cut_channels(
    groups: Sequence[Group], sites: Mapping[str, Site], model: nn.Module
) -> dict[str, list[tuple[int, int]]]:
    """For weights that read more than LARGEST columns the ranges of channels that are compensated apart.

    No atom lies in two of them. Where even n^2 of a consumer is too much, what atoms of different ranges could make up
    for each other is given up.
    """
    weights, cuts = dict(model.named_parameters()), {}
    read = [*consumed(groups, sites).values(), *in_matrices(groups, sites).values()]
    for name in sorted({w for names in read for w in names}):
        matrix = to_matrix(weights[name].detach().to("meta"), sites[name].kind, sites[name].groups)
        taps, channels = matrix.shape[2:]
        if taps * channels > LARGEST:
            readers = [_reader(g, sites[name], weights[name]) for g in groups if name in consumed([g], sites)[g.name]]
            cuts[name] = _ranges([r.positions for r in readers], channels, max(1, LARGEST // taps))
    return cuts


def gram_bytes(model: nn.Module, site: Site, cut: Sequence[tuple[int, int]] | None) -> int:
    """What the Gram of a weight takes, whole or in the ranges of channels `cut`."""
    matrix = to_matrix(model.get_parameter(site.weight).detach().to("meta"), site.kind, site.groups)
    groups, _, taps, channels = matrix.shape
    return 8 * groups * sum((taps * (stop - start)) ** 2 for start, stop in cut or [(0, channels)])


def _ranges(owned: Sequence[Tensor], channels: int, most: int) -> list[tuple[int, int]]:
    """Ranges of at most `most` channels, of more only where an atom spans them; owned: [atoms, positions] a group."""
    tied = torch.zeros(channels + 1, dtype=torch.long)  # counts atoms that lie on both sides of a place
    for positions in owned:
        low, high = positions.min(1).values, positions.max(1).values
        ones = torch.ones_like(low)
        tied.index_add_(0, low + 1, ones).index_add_(0, high + 1, -ones)
    free = (tied.cumsum(0) == 0).nonzero()[:, 0].tolist()
    ranges, start, last = [], 0, 0
    for place in [p for p in free if p > 0]:
        if place - start > most and last > start:
            ranges.append((start, last))
            start = last
        last = place
    return [*ranges, (start, channels)]


def _reader(group: Group, site: Site, weight: Tensor) -> Reader:
    slices = [s for s in group.slices if s.tensor == site.weight and s.role == "consume"]
    dim = slices[0].dim
    per_group = weight.shape[dim] // (site.groups if site.kind == "transposed" else 1)
    owned = [sorted({p % per_group for s in slices for p in s.positions(a)}) for a in range(group.width)]
    kernel = tuple(weight.shape[2:])
    return Reader(
        *(site.weight, site.kind, site.groups, kernel, dim, site.bias), patterned(weight), torch.tensor(owned)
    )
