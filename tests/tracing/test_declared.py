"""Groups that a file declares, on a model: the same as those found, or a named diff."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.errors import InputError
from autoprune.structure import Slice
from autoprune.tracing.analyze import analyze
from autoprune.tracing.declared import declared, dense_shapes, misfits, wider
from autoprune.tracing.slim import slim

INPUTS = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


class Halves(nn.Module):
    """The channels before a grouped convolution go in pairs, one of each half."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.halves = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.halves(F.relu(self.stem(x)))).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Halves().eval()


def test_what_the_analysis_finds_is_what_it_may_be_told(model: nn.Module) -> None:
    found = analyze(model, INPUTS)
    told = declared(model, INPUTS, found.groups)
    assert (told.groups, told.ops) == (found.groups, found.ops)
    assert declared(model, INPUTS, ()).groups == ()


def test_another_width_is_counted_in_atoms(model: nn.Module) -> None:
    groups = analyze(model, INPUTS).groups
    assert {g.name: g.width for g in groups} == {"stem": 12, "halves": 12}
    narrow, wide = Halves(22), Halves(32)
    assert misfits(narrow, groups) == {n: "policy says 12 wide, model has 11" for n in ("stem", "halves")}
    assert "policy says 12 wide, model has 16" in str({**misfits(wide, groups), **wider(wide, groups)})
    with pytest.raises(InputError, match="stem: policy says 12 wide, model has 11; halves: "):
        declared(narrow, INPUTS, groups)


def test_shapes_come_from_the_file_or_from_the_reach_of_the_slices(model: nn.Module) -> None:
    groups = analyze(model, INPUTS).groups
    assert dense_shapes(groups, {})["stem.weight"] == [24]
    assert dense_shapes(groups, {"stem.weight": (24, 3, 3, 3)})["stem.weight"] == [24, 3, 3, 3]


def test_a_slice_of_nothing_is_a_named_diff(model: nn.Module) -> None:
    first, *rest = analyze(model, INPUTS).groups
    for part, message in (
        (Slice("stem.scale", 0, "carry"), "stem: it lacks the tensor 'stem.scale'"),
        (Slice("stem.bias", 1, "carry"), "stem.bias has 1 dimensions, the policy cuts dimension 1"),
    ):
        with pytest.raises(InputError, match=message):
            declared(model, INPUTS, (replace(first, slices=(*first.slices, part)), *rest))
    with pytest.raises(InputError, match="stem: it has no slices"):
        declared(model, INPUTS, (replace(first, slices=()), *rest))


def test_the_lent_model_is_untouched(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    structure = declared(model, INPUTS, analyze(model, INPUTS).groups)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    slim(model, structure, {"stem": tuple(range(5))})
    assert model.stem.weight.shape[0] == 10
