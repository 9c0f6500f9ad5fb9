"""From values of tensor elements to one value an atom, and the weights that are scored one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.structure import Group, Role, Slice


def atom_sums(values: Tensor, piece: Slice, width: int) -> Tensor:
    """Sum of `values` (the shape of the slice's tensor) over everything that an atom owns, [width]."""
    rows = values.detach().cpu().double().movedim(piece.dim, 0).reshape(values.shape[piece.dim], -1).sum(1)
    return torch.stack([rows[list(piece.positions(a))].sum() for a in range(width)])


def summed_by_atom(
    model: nn.Module, groups: Sequence[Group], scores: Callable[[Sequence[str]], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Scores of atoms [width] by group: what each owns of the producing weights, whose own scores are added up.

    `scores` gives those of the weights of the names that it is called with, in the shape of each; a weight that it
    leaves out counts for nothing.
    """
    pieces = {group.name: [piece for piece, _ in produced_weights(model, group)] for group in groups}
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names = dict.fromkeys(piece.tensor for found in pieces.values() for piece in found if piece.tensor in own)
    values = scores(tuple(names))
    return {
        group.name: sum(
            (atom_sums(values[p.tensor], p, group.width) for p in pieces[group.name] if p.tensor in values),
            torch.zeros(group.width, dtype=torch.float64),
        )
        for group in groups
    }


def normalised_total(model: nn.Module, group: Group, score: Callable[[Tensor, Slice, int], Tensor]) -> Tensor:
    """What `score` gives [width] for each producing weight, its slice and the width, normalised and added."""
    parts = [normalised(score(weight, piece, group.width)) for piece, weight in produced_weights(model, group)]
    return sum(parts, torch.zeros(group.width, dtype=torch.float64))


def named_weights(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters `names` of `model`; one that two layers share has either's name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: parameters[name] for name in names}


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
