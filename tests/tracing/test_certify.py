"""A certificate removes what could hurt, holds for every seed, and does not depend on what the weights happen to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.structure import Group, Size, Slice, Stand
from autoprune.tracing.analyze import analyze
from autoprune.tracing.certify import RULES, Certifier, masked_in_place
from autoprune.tracing.inputs import few_samples
from autoprune.tracing.observe import observe
from autoprune.tracing.slim import named_tensors
from autoprune.tracing.verify import random_keep
from tests.families import FAMILIES
from tests.tracing.test_frozen import Way, conv

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))

BY_NUMBER: dict[str, Callable[[Tensor], Tensor]] = {
    "the first is a mask": lambda y: y * torch.sigmoid(y[:, :1]),
    "the last is a confidence": lambda y: y * torch.sigmoid(y[:, -1:]),
    "the third is overwritten": lambda y: torch.cat([y[:, :2], y[:, 2:3] * 0, y[:, 3:]], 1),
    "the fifth is added": lambda y: y + y[:, 4:5],
    "two are a flow": lambda y: y + y[:, :2].mean(1, keepdim=True),
    "one by a constant": lambda y: y - y.index_select(1, torch.tensor([7])),
    "the first becomes the second": lambda y: torch.where(torch.arange(y.shape[1])[:, None, None] == 0, y[:, 1:2], y),
    "neighbours swap": lambda y: y.unflatten(1, (-1, 2)).flip(2).flatten(1, 2) if y.shape[1] % 2 == 0 else y,
}


@pytest.mark.parametrize("name", BY_NUMBER)
def test_channels_that_are_used_by_their_number_are_frozen_whatever_the_weights(name: str) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model = Way(
            lambda m, x: m.o(F.relu(m.b(BY_NUMBER[name](m.a(F.relu(m.free(x))))))),
            free=conv(3, 6),
            a=conv(6, 16),
            b=conv(16, 6),
            o=conv(6, 5),
        )
        structure = analyze(model, (X,), seed=seed)
        assert structure.names == ("free", "b")


class Gate(nn.Module):
    """Squeeze and excite of so few hidden units that all may be dead on two samples."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.conv, self.next, self.out = conv(3, 12), conv(12, 8), nn.Linear(8, 5)
        self.reduce, self.expand = nn.Conv2d(12, hidden, 1), nn.Conv2d(hidden, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = x * torch.sigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))
        y: Tensor = self.out(F.relu(self.next(x)).mean((2, 3)))
        return y


def test_dead_units_do_not_change_the_structure() -> None:
    found = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = Gate(2)
        found.append(analyze(model, (X,), seed=seed))
        with torch.no_grad():  # trained until nothing passes the gate
            model.reduce.bias.fill_(-9.0)
            model.next.weight[1:] = 0
        found.append(analyze(model, (X,), seed=seed))
    assert found[0].names == ("conv", "reduce", "next")
    assert all(structure == found[0] for structure in found)


def test_inputs_of_zeros_prove_as_well() -> None:
    model = Way(lambda m, x: m.c(m.a(x).relu()), a=nn.Linear(5, 8, bias=False), c=nn.Linear(8, 3))
    assert analyze(model, (torch.zeros(2, 5),)).names == ("a",)


def test_the_trials_remove_every_atom_and_leave_several_widths() -> None:
    for width in (2, 3, 7, 16):
        kept = [set(rule(width, number)) for number in (0, 1) for rules in RULES for rule in rules]
        assert all(0 < len(k) < width for k in kept)
        assert set.intersection(*kept) == set()
        assert {1, width - 1} <= {len(k) for k in kept}
        assert any(0 not in k for k in kept)
        assert any(width - 1 not in k for k in kept)


class Overwritten(nn.Module):
    """The first channels give way to what is made of them, of which there must be as many."""

    def __init__(self) -> None:
        super().__init__()
        self.first = 4
        self.a, self.b, self.c = nn.Linear(3, 9), nn.Linear(4, 4), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x[:, : self.first] = self.b(x[:, : self.first].clone())
        return self.c(x)


def test_groups_that_must_be_as_wide_as_each_other_do_not_hold_apart() -> None:
    def group(name: str, reader: str, *sizes: Size) -> Group:
        made = [Slice(f"{name}.{tensor}", 0, "produce") for tensor in ("weight", "bias")]
        return Group(name, "channel", 4, (*made, Slice(f"{reader}.weight", 1, "consume")), (4,), sizes)

    model, x = Overwritten().eval(), (torch.randn(2, 3),)
    look = observe(model, x)
    given, written = group("a", "b", Size("first", 4)), group("b", "c")
    assert Certifier.of(model, few_samples(model, x), look).failures([given, written])
    both = replace(given, slices=(*given.slices, *written.slices))
    assert not Certifier.of(model, few_samples(model, x), look).failures([both])


def test_a_wrong_group_is_named_and_the_right_ones_hold() -> None:
    family = FAMILIES["plain"]
    model = family.build().eval()
    structure = analyze(model, family.inputs())
    lacking = Group(
        "conv1", "channel", 8, (Slice("conv1.weight", 0, "produce"), Slice("conv2.weight", 1, "consume")), (8,)
    )
    certifier = Certifier.of(model, few_samples(model, family.inputs()), observe(model, family.inputs()))
    said = certifier.failures([lacking, *structure.groups[1:]])
    assert set(said) == {"conv1"}
    assert "the model does not run once its channels are removed" in said["conv1"]


def test_groups_that_are_expected_to_fail_are_tried_apart_and_get_the_same_verdict() -> None:
    family = FAMILIES["plain"]
    model = family.build().eval()
    structure = analyze(model, family.inputs())
    lacking = [replace(g, slices=tuple(s for s in g.slices if s.dim == 0)) for g in structure.groups[:2]]
    groups = [*lacking, *structure.groups[2:]]
    for doubtful in (set[str](), {"conv1", "conv2"}, {"conv1", structure.names[-1]}):
        certifier = Certifier.of(model, few_samples(model, family.inputs()), observe(model, family.inputs()))
        certifier.doubtful = frozenset(doubtful)
        assert set(certifier.failures(groups)) == {"conv1", "conv2"}


def test_masking_puts_back_what_it_zeroed() -> None:
    family = FAMILIES["resnext"]
    model = family.build().eval()
    structure = analyze(model, family.inputs())
    before = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    keep = {g.name: (0,) for g in structure.groups}
    with masked_in_place(model, structure, keep):
        changed = {n for n, t in named_tensors(model).items() if not torch.equal(t, before[n])}
    assert changed == {s.tensor for g in structure.groups for s in g.slices if s.role == "consume"}
    assert all(torch.equal(t, before[n]) for n, t in named_tensors(model).items())


def test_random_keep_stays_on_the_grid_and_takes_groups_of_one_atom() -> None:
    rng = np.random.default_rng(0)
    groups = [
        Group("block", "block", 1, (), (0, 1), (), (Stand("conv", "zero"),)),
        Group("a", "channel", 8, (), (4, 8)),
        Group("b", "channel", 1, (), (1,)),
    ]
    seen = [random_keep(groups, rng) for _ in range(30)]
    for keep in seen:
        assert (len(keep["a"]), keep["b"]) == (4, (0,))
        assert list(keep["a"]) == sorted(set(keep["a"]))
    absent = sum(keep["block"] == () for keep in seen)
    assert 0 < absent < 15, "most blocks stay"
