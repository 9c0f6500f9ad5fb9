"""Blocks: residual branches that a forward pass shows, proved by experiment, and left out as whole modules."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.allocation.polynomial import macs_polynomial, numel_polynomial
from autoprune.criteria.obs import Obs
from autoprune.database.build import build_database
from autoprune.database.stitch import Stitcher
from autoprune.errors import InputError
from autoprune.families import analyze
from autoprune.policy import Policy
from autoprune.space import Space, restrict
from autoprune.structure import Group, Stand, Structure
from autoprune.tasks._cifar_resnet import resnet20
from autoprune.tracing.ops import count_macs
from autoprune.tracing.slim import slim
from autoprune.tracing.stand_ins import StandIn
from autoprune.tracing.verify import audit, random_keep, verify
from tests.branches import Net
from tests.small import world_of
from tests.synthetic import chain, with_blocks

X = (torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0)),)


def blocks_of(model: nn.Module) -> list[str]:
    return [g.name for g in analyze(model.eval(), X) if g.kind == "block"]


def test_what_a_module_adds_to_its_input_is_a_block_where_nothing_else_becomes_of_it() -> None:
    mixes = ("", "gate", "shift", "product", "twice")
    assert blocks_of(Net(*mixes)) == ["blocks.0", "blocks.1", "blocks.2"]
    structure = analyze(Net("", "gate").eval(), X)
    assert structure.group("blocks.0").stands == (
        *(Stand(f"blocks.0.{name}", "input") for name in ("a", "b")),
        Stand("blocks.0.norm", "zero"),
    )
    inside = {structure.names[b]: [structure.names[i] for i in inner] for b, inner in structure.inside}
    assert inside == {"blocks.0": ["blocks.0.a"], "blocks.1": ["blocks.1.a"]}


def test_a_block_that_is_used_twice_stays() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.blocks(self.blocks(x)).mean((2, 3)))
            return logits

    assert blocks_of(Twice("")) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_slim_resnet_is_the_masked_one_and_costs_what_the_polynomials_say(seed: int) -> None:
    model, x = resnet20().eval(), (torch.randn(2, 3, 32, 32),)
    structure = analyze(model, x)
    keep = random_keep(structure.groups, np.random.default_rng(seed))
    small = copy.deepcopy(model)
    slim(small, structure, keep)
    assert verify(small, model, structure, keep, x) < 1e-5
    widths = np.array([len(keep[name]) for name in structure.names])
    assert int(macs_polynomial(structure)(widths)) == count_macs(small, x)
    params = numel_polynomial(structure, lambda spec: int(spec.is_parameter))
    assert int(params(widths)) == sum(p.numel() for p in small.parameters())
    policy = Policy.from_array(structure, widths)
    assert int(macs_polynomial(structure)(policy.array(structure))) == count_macs(small, x), "one form, one cost"


def test_nothing_of_an_absent_block_is_left() -> None:
    model = Net("", "").eval()
    structure = analyze(model, X)
    small = copy.deepcopy(model)
    slim(small, structure, {"blocks.0": ()})
    assert not any(name.startswith("blocks.0.") for name in small.state_dict())
    assert isinstance(small.blocks[0].norm, StandIn)
    expected = model.head(model.blocks[1](X[0]).mean((2, 3)))
    torch.testing.assert_close(small(X[0]), expected)


def test_a_policy_has_one_form_and_no_other_is_let_in() -> None:
    structure = analyze(Net("", "").eval(), X)
    narrow = {g.name: g.grid[0] for g in structure}
    policy = Policy.from_array(structure, [narrow[name] for name in structure.names])
    assert policy.as_dict() == {"blocks.0": 0, "blocks.0.a": 12, "blocks.1": 0, "blocks.1.a": 12}
    policy.check(structure)
    with pytest.raises(InputError, match=r"leaves out block 'blocks.0', and group 'blocks.0.a' inside it is 1 wide"):
        Policy.of(narrow).check(structure)


def test_stand_ins_return_what_is_unpacked_of_the_original() -> None:
    x = torch.randn(2, 3)
    given = StandIn("input")(x)
    assert torch.equal(given, x)
    assert given.data_ptr() != x.data_ptr(), "what comes next may write into it"
    assert torch.equal(StandIn("zero")(x), torch.zeros(2, 3))
    first, second = StandIn("zero", 2)(mask=torch.ones(1), hidden_states=x)
    assert torch.equal(first, torch.zeros(2, 3))
    assert second is None
    with pytest.raises(InputError, match="gives one of"):
        Stand("a", "half")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a block is one atom"):
        Group("a", "block", 1, (), (0, 1))
    assert Structure((Group("a", "block", 1, (), (0, 1), (), (Stand("a", "zero"),)),), ()).inside == ()


@pytest.mark.parametrize("absent", [("blocks.0",), ("blocks.1",), ("blocks.0", "blocks.2")])
def test_what_is_written_in_place_behind_an_absent_block_leaves_its_input_alone(absent: tuple[str, ...]) -> None:
    model = Net("inplace", "inplace", "inplace").eval()
    structure = analyze(model, X)
    assert [g.name for g in structure if g.kind == "block"] == ["blocks.0", "blocks.1", "blocks.2"]
    small = copy.deepcopy(model)
    slim(small, structure, dict.fromkeys(absent, ()))
    assert verify(small, model, structure, dict.fromkeys(absent, ()), X) < 1e-5, "forward, and backward once"


def test_blocks_whose_tensors_are_held_elsewhere_too_stay() -> None:
    model = Net("", "alias", "", "").eval()
    model.blocks[3].a.weight = model.blocks[2].a.weight  # type: ignore[union-attr]
    assert blocks_of(model) == ["blocks.0"]


def test_narrow_convolutions_in_blocks_are_no_depthwise_ones() -> None:
    w = world_of(Net("", "", "").eval(), (8, 6, 6))
    stitcher = Stitcher(w.model, w.structure, build_database(w.model, w.structure, w.seen, Obs()))
    dense = Policy.dense(w.structure)
    for name in ("blocks.0.a", "blocks.1.a"):
        stitcher.stitch(Policy.of({**dense.as_dict(), name: 1}))
        audit(stitcher.model)
        assert stitcher.model.blocks[0].a.groups == 1  # type: ignore[index, union-attr]
    torch.testing.assert_close(stitcher.stitch(dense)(*w.task.example_inputs()), w.model(*w.task.example_inputs()))


def test_blocks_inside_of_an_absent_block_are_dense() -> None:
    plain = with_blocks(chain(4))
    both = [s for g in plain.groups[:2] for s in g.slices]
    outer = replace(plain.groups[0], name="outer", slices=tuple(both))
    structure = Structure((outer, *plain.groups), plain.ops)
    assert [structure.names[i] for i, _ in structure.inside] == ["outer", "block1"]
    for inner in ((0, 0), (1, 0), (1, 1)):
        array = [0, *inner, *(g.width for g in plain.groups[2:])]
        policy = Policy.from_array(structure, array)
        assert policy == Policy.of({**Policy.dense(structure).as_dict(), "outer": 0})
    with pytest.raises(InputError, match=r"leaves out block 'outer', and group 'block1' inside it is 0 wide"):
        Policy.of({**Policy.dense(structure).as_dict(), "outer": 0, "block1": 0}).check(structure)


def test_a_block_that_holds_an_excluded_group_or_is_overridden_stays() -> None:
    structure = analyze(Net("", "", "").eval(), X)
    space = Space(exclude=("blocks.0.a",), overrides={"blocks.1": {"max_sparsity": 0.0}})
    assert [g.name for g in restrict(structure, space) if g.kind == "block"] == ["blocks.2"]
