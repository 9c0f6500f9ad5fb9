"""What the job's space section allows: grids, exclusions with reasons, globs that must match."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from autoprune.errors import InputError
from autoprune.space import Space, restrict
from autoprune.structure import Group, Slice, Stand, Structure
from tests.synthetic import chain

STRUCTURE = chain(12)


def one(width: int, kind: str = "channel") -> Structure:
    grid = (0, 1) if kind == "block" else tuple(range(1, width + 1))
    stands = (Stand("only", "zero"),) if kind == "block" else ()
    return Structure((Group("only", kind, width, (), grid, (), stands),), ())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("width", "space", "grid"),
    [
        (10, Space(), tuple(range(1, 11))),
        (64, Space(multiple_of=1, max_sparsity=0.9), tuple(range(7, 65))),
        (32, Space(max_sparsity=0.9), tuple(range(4, 33))),
        (64, Space(max_sparsity=0.9), tuple(range(8, 65, 2))),
        (100, Space(max_sparsity=0.9), tuple(range(12, 101, 4))),
        (128, Space(max_sparsity=0.9), tuple(range(16, 129, 8))),
        (2048, Space(max_sparsity=0.9), tuple(range(256, 2049, 64))),
        (16, Space(multiple_of=8), (8, 16)),
        (20, Space(multiple_of=8, max_sparsity=0.5), (16, 20)),
        (20, Space(multiple_of=8, max_sparsity=1.0), (8, 16, 20)),
        (30, Space(overrides={"o*": {"max_sparsity": 0.1}}), (27, 28, 29, 30)),
        (30, Space(overrides={"*": {"max_sparsity": 0.1}, "only": {"multiple_of": 10}}, max_sparsity=0.5), (30,)),
    ],
)
def test_grids_have_a_floor_a_step_and_the_full_width(width: int, space: Space, grid: tuple[int, ...]) -> None:
    if len(grid) == 1:
        with pytest.raises(InputError, match="no smaller width"):
            restrict(one(width), space)
    else:
        assert restrict(one(width), space).groups[0].grid == grid


def grouped(width: int, each: int) -> Structure:
    """Atoms of `each` channels, as the convolution groups of a ResNeXt tie them, and one position of a fused weight."""
    slices = (
        Slice("conv.weight", 0, "produce", stride=each, repeat=each),
        Slice("next.weight", 1, "consume", 0, each, each),
    )
    return Structure((Group("only", "channel", width, slices, tuple(range(1, width + 1))),), ())


def test_a_step_counts_channels_and_not_atoms() -> None:
    assert restrict(grouped(8, 4), Space(multiple_of=8)).groups[0].grid == (2, 4, 6, 8)
    assert restrict(grouped(8, 4), Space(multiple_of=4)).groups[0].grid == (1, 2, 3, 4, 5, 6, 7, 8)
    assert restrict(grouped(128, 4), Space()).groups[0].grid == (16, *range(16, 129, 4))[1:]
    flattened = (Slice("conv.weight", 0, "produce"), Slice("fc.weight", 1, "consume", stride=49, repeat=49))
    wide = Structure((Group("only", "channel", 16, flattened, tuple(range(1, 17))),), ())
    assert restrict(wide, Space(multiple_of=8)).groups[0].grid == (8, 16)


@pytest.mark.parametrize(
    ("width", "space", "step", "grid"),
    [
        (256, Space(), 1, range(32, 257, 8)),
        (256, Space(), 16, range(32, 257, 16)),
        (64, Space(), 16, (16, 32, 48, 64)),
        (48, Space(), 16, range(6, 49, 2)),
        (100, Space(), 8, (16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 100)),
        (48, Space(), 12, (12, 24, 36, 48)),
        (256, Space(multiple_of=4), 16, range(28, 257, 4)),
        (256, Space(overrides={"only": {"multiple_of": 4}}), 16, range(28, 257, 4)),
    ],
)
def test_where_widths_are_left_to_us_wide_groups_have_the_steps_of_what_computes_them(
    width: int, space: Space, step: int, grid: Sequence[int]
) -> None:
    assert restrict(one(width), space, step).groups[0].grid == tuple(grid)
    neurons = Structure((Group("only", "neuron", width, (), tuple(range(1, width + 1))),), ())
    assert restrict(neurons, space, step) == restrict(neurons, space)


def test_a_step_from_outside_counts_channels_too() -> None:
    assert restrict(grouped(16, 4), Space(), 8).groups[0].grid == tuple(range(2, 17, 2))
    assert restrict(grouped(16, 32), Space(), 8) == restrict(grouped(16, 32), Space())


def test_a_block_is_kept_or_dropped_whatever_the_step() -> None:
    assert restrict(one(1, "block"), Space(granularity=("block",), multiple_of=8)).groups[0].grid == (0, 1)


def test_what_is_left_out_is_frozen_with_its_reason_and_the_fingerprint_stays() -> None:
    space = Space(include=("layer1*", "layer3"), exclude=("layer10",))
    restricted = restrict(STRUCTURE, space)
    assert restricted.names == ("layer1", "layer3", "layer11")
    assert restricted.frozen["layer10"] == "excluded by 'layer10' (space.exclude)"
    assert restricted.frozen["layer2"] == "not among space.include"
    assert restricted.frozen["head"] == STRUCTURE.frozen["head"]
    assert restricted.fingerprint == STRUCTURE.fingerprint


def test_other_kinds_are_left_out_with_their_reason() -> None:
    mixed = Structure((*one(8).groups, Group("heads", "head", 4, (), (1, 2, 3, 4))), ())
    assert "its kind is head" in restrict(mixed, Space(granularity=("channel",))).frozen["heads"]
    assert restrict(mixed, Space()).names == (*one(8).names, "heads")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Space(include=("layr1",)), r"space.include: 'layr1' matches no group; did you mean 'layer1'"),
        (Space(exclude=("conv*",)), r"space.exclude: 'conv\*' matches no group.*allowed: layer0, layer1, layer10"),
        (Space(overrides={"x": {}}), r"space.overrides: 'x' matches no group"),
        (Space(exclude=("*",)), r"nothing is left to search"),
        (Space(granularity=("head",)), r"the model has no groups of kind head; it has channel"),
    ],
)
def test_a_space_that_cannot_be_meant_is_an_error_that_says_what_there_is(space: Space, message: str) -> None:
    with pytest.raises(InputError, match=message):
        restrict(STRUCTURE, space)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"multiple_of": 0}, "space.multiple_of must be 'auto' or an integer >= 1, not 0"),
        ({"max_sparsity": 1.5}, "space.max_sparsity must be between 0 and 1, not 1.5"),
        ({"overrides": {"a": {"max_sparsty": 1}}}, "unknown key 'max_sparsty'; did you mean 'max_sparsity'"),
    ],
)
def test_wrong_values_are_refused_at_birth(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Space(**values)  # type: ignore[arg-type]
