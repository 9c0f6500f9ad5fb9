"""Groups of weights in a space: their grids, what a pattern does to what feeds its matrices, what is left dense."""

from __future__ import annotations

import pytest

from autoprune.errors import InputError
from autoprune.matrices import DENSITIES
from autoprune.space import Space, restrict
from autoprune.structure import Group, Op, Slice, Structure, TensorSpec
from tests.synthetic import chain, with_blocks

STRUCTURE = chain(6)
MATRICES = [f"layer{i}.weight" for i in range(6)]


def fed(width: int, each: int = 1, inputs: int | None = None) -> Structure:
    """A layer whose outputs, `each` positions an atom, are the inputs of a second one."""
    first, second = TensorSpec("a.weight", (width, 16), 4), TensorSpec("b.weight", (8, inputs or width * each), 4)
    ops = (
        Op("a", "Linear", 0, 1, first.name, tensors=(first,)),
        Op("b", "Linear", 1, 1, second.name, tensors=(second,)),
    )
    slices = (Slice(first.name, 0, "produce"), Slice(second.name, 1, "consume", 0, each, each))
    return Structure((Group("a", "channel", width, slices, tuple(range(1, width + 1))),), ops)


def grids(structure: Structure) -> dict[str, tuple[int, ...]]:
    return {g.name: g.grid for g in structure}


def test_weights_alone_leave_the_channels_with_their_reason() -> None:
    found = restrict(STRUCTURE, Space(("weight",)))
    assert {g.kind for g in found} == {"weight"}
    assert {*MATRICES, "layer2.short", "head.weight"} <= set(found.names)
    assert found.frozen["layer0"] == "its kind is channel, the job searches weight (space.granularity)"
    assert found.fingerprint == STRUCTURE.fingerprint
    for group in found:
        shares = [w / group.width for w in group.grid]
        assert shares == pytest.approx([d for d in DENSITIES if d >= shares[0] - 1e-9], abs=1 / group.width)
        assert all(w <= d * group.width + 1e-6 for w, d in zip(group.grid[::-1], DENSITIES[::-1], strict=False))


def test_the_largest_sparsity_and_the_step_bind_structured_kinds_alone() -> None:
    found = grids(restrict(STRUCTURE, Space(("channel", "weight"), multiple_of=4, max_sparsity=0.5)))
    plain = grids(restrict(STRUCTURE, Space(("channel",), multiple_of=4, max_sparsity=0.5)))
    alone = grids(restrict(STRUCTURE, Space(("weight",))))
    assert found == plain | alone


def test_auto_never_means_weights() -> None:
    assert all(g.kind == "channel" for g in restrict(STRUCTURE, Space()))


def test_an_override_is_the_floor_of_a_matrix() -> None:
    found = restrict(STRUCTURE, Space(("weight",), overrides={"layer3*": {"max_sparsity": 0.7}}))
    (group,) = (g for g in found if g.name == "layer3.weight")
    assert [round(w / group.width, 2) for w in group.grid] == [0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0]
    held = restrict(STRUCTURE, Space(("weight",), overrides={"layer3.weight": {"max_sparsity": 0.0}}))
    assert held.frozen["layer3.weight"] == "space.overrides keeps it dense"
    patterned = restrict(STRUCTURE, Space(("2:4",), overrides={"layer3.weight": {"max_sparsity": 0.4}}))
    said = "space.overrides keeps it dense: max_sparsity 0.4 is less than the 0.5 that 2:4 takes"
    assert patterned.frozen["layer3.weight"] == said


def test_less_than_a_weight_a_row_is_refused_with_what_is_allowed() -> None:
    words = r"max_sparsity 0\.95 leaves 'a\.weight' less than one weight for each of its 12 rows of 16; at most 0\.9375"
    with pytest.raises(InputError, match=words):
        restrict(fed(12), Space(("weight",), overrides={"a.weight": {"max_sparsity": 0.95}}))
    most = restrict(fed(12), Space(("weight",), overrides={"a.weight": {"max_sparsity": 0.9375}}))
    assert grids(most)["a.weight"][0] == 19  # the grid's .1, as .05 would leave less than one
    restrict(fed(12), Space(("weight",), exclude=("a.weight",), overrides={"a*": {"max_sparsity": 0.95}}))


def test_what_is_left_dense_says_why() -> None:
    found = restrict(STRUCTURE, Space(("weight",), include=("layer*",), exclude=("layer0*",)))
    assert found.frozen["layer0.weight"] == "excluded by 'layer0*' (space.exclude)"
    assert found.frozen["head.weight"] == "not among space.include"
    assert "layer0.weight" not in found.names


def test_a_matrix_that_the_pattern_does_not_divide_stays_dense_and_may_be_excluded_by_name() -> None:
    found = restrict(STRUCTURE, Space(("2:4",)))
    assert found.frozen["layer0.weight"] == "it reads 3 inputs, which 2:4 does not divide: it stays dense"
    assert all(g.grid == (g.width // 2, g.width) for g in found)
    assert restrict(STRUCTURE, Space(("2:4",), exclude=("layer0.weight",))).names == found.names
    with pytest.raises(InputError, match=r"no weight of the model can be 5:7: the inputs of none divide by 7"):
        restrict(STRUCTURE, Space(("5:7",)))


@pytest.mark.parametrize(
    ("width", "each", "space", "grid"),
    [
        (12, 1, Space(("channel", "2:4")), (4, 8, 12)),
        (12, 2, Space(("channel", "2:4")), (2, 4, 6, 8, 10, 12)),
        (12, 4, Space(("channel", "2:4")), tuple(range(2, 13))),
        (24, 1, Space(("channel", "4:8"), multiple_of=8), (8, 16, 24)),
        (24, 1, Space(("channel", "2:4"), overrides={"a": {"multiple_of": 12}}, max_sparsity=0.7), (12, 24)),
        (12, 1, Space(("channel", "2:4"), exclude=("b.weight",)), tuple(range(2, 13))),
        (12, 1, Space(("channel", "weight")), tuple(range(2, 13))),
    ],
)
def test_what_feeds_a_patterned_matrix_leaves_it_a_multiple_of_m(
    width: int, each: int, space: Space, grid: tuple[int, ...]
) -> None:
    assert grids(restrict(fed(width, each), space))["a"] == grid


def test_a_step_that_breaks_the_pattern_is_one_line() -> None:
    words = r"space\.multiple_of: in steps of 6 'a' leaves 'b\.weight' numbers of inputs that 2:4 does not divide; let"
    with pytest.raises(InputError, match=words):
        restrict(fed(24), Space(("channel", "2:4"), multiple_of=6))
    with pytest.raises(InputError, match=r"space\.overrides: in steps of 1 'a'"):
        restrict(fed(24), Space(("channel", "2:4"), overrides={"a": {"multiple_of": 1}}))


def test_a_group_without_such_a_width_stays_dense() -> None:
    found = restrict(fed(4), Space(("channel", "2:4")))
    assert found.frozen["a"] == "4 wide: 2:4 divides no smaller width for what reads it"
    assert found.names == ("a.weight", "b.weight")


def test_an_excluded_matrix_keeps_no_block() -> None:
    blocks = with_blocks(STRUCTURE)
    found = restrict(blocks, Space(("block", "weight"), exclude=("layer3.weight",)))
    assert "block3" in found.names
    assert "layer3.weight" not in found.names


def test_bits_and_zeros_of_one_matrix_are_two_groups() -> None:
    found = restrict(STRUCTURE, Space(("weight",), bits=(32, 8)))
    rounded = [g.matrices[0] for g in found if g.kind == "bits"]
    assert rounded
    for name in rounded:
        assert [g.name for g in found if g.matrices == (name,)] == [f"{name}@bits", name]


@pytest.mark.parametrize("kinds", [("weight", "2:4"), ("2:4", "4:8"), ("4:2",)])
def test_kinds_that_exclude_each_other_make_no_space(kinds: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"space\.granularity: .*(exclude each other|is no pattern)"):
        Space(kinds)


def test_what_is_excluded_is_said_before_what_nobody_asked_for() -> None:
    with pytest.raises(InputError, match=r"\S+ and \d+ more: excluded by '\*'.*its kind is") as caught:
        restrict(STRUCTURE, Space(("weight",), exclude=("*",)))
    assert "\n" not in str(caught.value)
