"""Blocks: residual branches that a forward pass shows, proved by experiment, and left out as whole modules."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.allocation.polynomial import macs_polynomial, numel_polynomial
from autoprune.errors import InputError
from autoprune.families import analyze
from autoprune.policy import Policy
from autoprune.structure import Group, Stand, Structure
from autoprune.tasks._cifar_resnet import resnet20
from autoprune.tracing.ops import count_macs
from autoprune.tracing.slim import slim
from autoprune.tracing.stand_ins import StandIn
from autoprune.tracing.verify import random_keep, verify
from tests.branches import Net

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
    assert StandIn("input")(x) is x
    assert torch.equal(StandIn("zero")(x), torch.zeros(2, 3))
    first, second = StandIn("zero", 2)(mask=torch.ones(1), hidden_states=x)
    assert torch.equal(first, torch.zeros(2, 3))
    assert second is None
    with pytest.raises(InputError, match="gives one of"):
        Stand("a", "half")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a block is one atom"):
        Group("a", "block", 1, (), (0, 1))
    assert Structure((Group("a", "block", 1, (), (0, 1), (), (Stand("a", "zero"),)),), ()).inside == ()
