"""From values of tensor elements to one value an atom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from autoprune.structure import Group, Role, Slice


def atom_sums(values: Tensor, piece: Slice, width: int) -> Tensor:
    """Sum of `values` (the shape of the slice's tensor) over everything that an atom owns, [width]."""
    rows = values.detach().cpu().double().movedim(piece.dim, 0).reshape(values.shape[piece.dim], -1).sum(1)
    return torch.stack([rows[list(piece.positions(a))].sum() for a in range(width)])


def produced_weights(model: nn.Module, group: Group) -> Iterator[tuple[Slice, Tensor]]:
    """Slices of the weight matrices (two dimensions and more) that write the group's activations."""
    yield from _slices(model, group, "produce", vector=False)


def carried_vectors(model: nn.Module, group: Group) -> Iterator[tuple[Slice, Tensor]]:
    """Slices of vectors that scale or shift the group's activations on their way."""
    yield from _slices(model, group, "carry", vector=True)


def normalised(scores: Tensor) -> Tensor:
    """Scores divided by their mean, so that several tensors of a group count alike."""
    return scores / scores.mean().clamp_min(1e-30)


def _slices(model: nn.Module, group: Group, role: Role, vector: bool) -> Iterator[tuple[Slice, Tensor]]:
    tensors: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    for piece in group.slices:
        if piece.role == role and (tensors[piece.tensor].dim() == 1) == vector:
            yield piece, tensors[piece.tensor]
