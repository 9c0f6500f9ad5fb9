"""Whole numbers that modules hold: which there are, and how they are set."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from autoprune.errors import InputError
from autoprune.structure import Group, Size, Structure
from autoprune.tracing.sizes import number_at, numbers_in, set_number, set_sizes


class Held(nn.Module):
    """Numbers, and what is none."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.cuts, self.one, self.flag, self.share = 6, (3, 2, 1), 1, True, 0.5
        self.listed: list[Any] = [4, "a"]
        self.inner = nn.Conv2d(8, 8, 3)


def test_the_numbers_of_a_module_are_those_that_can_be_fewer() -> None:
    assert list(numbers_in(Held())) == [("width", None, 6), ("cuts", 0, 3), ("cuts", 1, 2), ("listed", 0, 4)]


def test_those_of_torchs_own_layers_are_left_to_their_tensors() -> None:
    assert list(numbers_in(nn.Conv2d(8, 8, 3))) == []


def test_a_number_goes_by_its_path() -> None:
    model = nn.ModuleDict({"held": Held()})
    assert number_at(model, "held.width", None) == 6
    assert number_at(model, "held.cuts", 1) == 2
    for attribute, index in (("held.cuts", 3), ("held.width", 0), ("held.flag", None), ("lost.width", None)):
        assert number_at(model, attribute, index) is None


def test_a_list_that_others_hold_stays_as_it_is() -> None:
    module, shared = Held(), [3, 4]
    module.listed = shared
    set_number(module, "listed", 1, 2)
    assert module.listed == [3, 2]
    assert shared == [3, 4]


def test_several_groups_may_count_in_one_number() -> None:
    groups = (
        Group("a", "channel", 2, (), (1, 2), (Size("width", 6),)),
        Group("b", "channel", 2, (), (1, 2), (Size("width", 6, each=2), Size("cuts", 3, 0))),
    )
    model = Held()
    for widths, expected in (({"a": 1, "b": 1}, (3, (2, 2, 1))), ({"b": 1}, (4, (2, 2, 1))), ({}, (6, (3, 2, 1)))):
        set_sizes(model, Structure(groups, ()), widths)
        assert (model.width, model.cuts) == expected


def test_a_number_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"size .a\.width.: value and each must be >= 1"):
        Size("a.width", 0)
