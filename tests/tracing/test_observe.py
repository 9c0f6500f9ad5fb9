"""Experiments run on images as small as show the same, and what they prove is tried at the size that was given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.structure import Structure
from autoprune.tracing.analyze import analyze
from autoprune.tracing.copies import private_copy, shadow
from autoprune.tracing.observe import Look, observe
from autoprune.tracing.ops import count_macs
from tests.tracing.test_frozen import Way, conv


def images(side: int, batch: int = 2) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)),)


def net(way: Callable[[Tensor], Tensor]) -> nn.Module:
    """Two convs behind any forward of the first one's channels, and a linear behind their mean."""
    torch.manual_seed(0)
    return Way(
        lambda m, x: m.o(F.relu(m.b(way(F.relu(m.a(x))))).mean((2, 3))),
        a=conv(3, 6),
        b=conv(6, 8),
        o=nn.Linear(8, 5),
    ).eval()


def flat(side: int) -> nn.Module:
    layers = [nn.Conv2d(3, 6, 3, side // 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(4, 2)).eval()


def look(model: nn.Module, inputs: tuple[Tensor, ...]) -> Look:
    return observe(private_copy(model), inputs)


def same_groups(one: Structure, other: Structure) -> bool:
    return one.groups == other.groups and one.frozen == other.frozen


def test_images_are_cut_to_the_smallest_side_and_costs_are_of_the_size_that_was_given() -> None:
    model, inputs = net(lambda y: y), images(160)
    seen = look(model, inputs)
    assert seen.reduced
    assert tuple(seen.small.inputs[0].shape) == (2, 3, 64, 64)
    assert tuple(seen.example.inputs[0].shape) == (2, 3, 160, 160)
    structure = analyze(model, inputs)
    assert same_groups(structure, analyze(model, images(64)))
    assert structure.names == ("a", "b")
    weights = {"a": 6 * 3, "b": 8 * 6, "o": 5 * 8}
    kernels = {op.name: int(torch.tensor(op.kernel).prod()) for op in structure.ops}
    assert sum(op.positions * weights[op.name] * kernels[op.name] for op in structure.ops) == count_macs(model, inputs)
    assert structure.ops[0].spatial == (160, 160)


@pytest.mark.parametrize(
    ("model", "side"),
    [
        (flat(128), 128),  # a linear layer that counts the pixels
        (net(lambda y: y), 80),  # nothing to gain
        (net(lambda y: y if y.shape[-1] < 100 else y - torch.logsumexp(y, 1, keepdim=True)), 160),
    ],
)
def test_the_size_that_was_given_is_taken_where_a_smaller_one_shows_another_model(model: nn.Module, side: int) -> None:
    seen = look(model, images(side))
    assert not seen.reduced
    assert seen.small is seen.example


def test_what_small_images_prove_is_not_believed_where_it_does_not_hold_at_full_size() -> None:
    def way(y: Tensor) -> Tensor:
        return y if y.shape[-1] < 100 else y - torch.logcumsumexp(y, 1)

    model = net(way)
    assert look(model, images(160)).reduced
    assert analyze(model, images(64)).names == ("a", "b")
    structure = analyze(model, images(160))
    assert structure.names == ("b",)
    assert "not the same as masking" in structure.frozen["a"]


def test_a_sample_is_enough_where_it_shows_the_channels_often() -> None:
    structure = analyze(net(lambda y: y), images(160))
    tokens = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    few, many = (look(tokens, (torch.randn(2, n, 3),)) for n in (15, 16))
    groups = analyze(tokens, (torch.randn(2, 16, 3),)).groups
    assert few.tried(groups).samples == 2
    assert len(many.tried(groups).inputs[0]) == many.tried(groups).samples == 1
    assert look(net(lambda y: y), images(160)).tried(structure.groups).samples == 2  # one vector a sample goes into `o`


def test_a_shadow_has_no_numbers_and_ties_what_is_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    unreal = shadow(model)
    assert all(t.is_meta for t in [*unreal.parameters(), *unreal.buffers()])
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert unreal[1].weight is unreal[0].weight
    assert [n for n, _ in unreal.named_parameters()] == [n for n, _ in model.named_parameters()]
