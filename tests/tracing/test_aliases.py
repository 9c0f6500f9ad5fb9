"""A module under two names and one Parameter in two modules: right, or frozen with the true reason."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.tracing.analyze import analyze
from tests.tracing.test_frozen import Way, conv

X = (torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)),)


def test_a_module_under_two_names_goes_by_the_first() -> None:
    first, norm = conv(3, 8), nn.BatchNorm2d(8)
    model = Way(
        lambda m, x: m.c(m.stem(x)), stem=nn.Sequential(first, norm, nn.ReLU()), first=first, norm=norm, c=conv(8, 2)
    )
    structure = analyze(model, X)
    assert structure.names == ("stem.0",)
    assert {s.tensor.split(".")[0] for s in structure.groups[0].slices} == {"stem", "c"}


def test_what_one_weight_in_two_layers_reads_goes_together() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.free(x))
        y: Tensor = m.o(F.relu(m.p(F.relu(m.a(x)))) + F.relu(m.q(F.relu(m.b(x)))))
        return y

    model = Way(way, free=conv(3, 6), a=conv(6, 8), b=conv(6, 8), p=conv(8, 9), q=conv(8, 9), o=conv(9, 2))
    q, p = model.get_submodule("q"), model.get_submodule("p")
    q.weight = p.weight
    structure = analyze(model, X)
    assert {g.name: g.width for g in structure} == {"free": 6, "a": 8, "p": 9}
    assert {s.tensor for s in structure.group("a").slices if s.role == "produce"} >= {"a.weight", "b.weight"}


def test_what_one_scale_in_two_norms_scales_goes_together() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.o(F.relu(m.second(m.b(F.relu(m.first(m.a(x)))))))
        return y

    model = Way(way, a=conv(3, 8), first=nn.BatchNorm2d(8), b=conv(8, 8), second=nn.BatchNorm2d(8), o=conv(8, 2))
    model.get_submodule("second").weight = model.get_submodule("first").weight
    structure = analyze(model, X)
    assert {g.name: g.width for g in structure} == {"a": 8}
    assert {s.tensor for s in structure.group("a").slices if s.role == "produce"} >= {"a.weight", "b.weight"}


def test_raw_parameters_of_a_list_are_narrowed_too() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.ParameterList([nn.Parameter(torch.ones(8, 1, 1))])

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scales[0]

    model = Way(lambda m, x: m.c(m.s(m.a(x))), a=conv(3, 8), s=Scales(), c=conv(8, 2))
    assert ("s.scales.0", 0) in {(s.tensor, s.dim) for s in analyze(model, X).group("a").slices}


def test_a_group_is_called_as_its_module_is() -> None:
    model = nn.Sequential()
    model.add_module("layer#1", nn.Linear(5, 8))
    model.add_module("layer#2", nn.Linear(8, 6))
    model.add_module("out", nn.Linear(6, 2))
    assert analyze(model, (torch.randn(2, 5),)).names == ("layer#1", "layer#2")


def test_of_norms_over_parts_of_the_channels_whole_parts_go() -> None:
    widths = []
    for groups in (2, 8):
        model = Way(lambda m, x: m.c(m.n(m.a(x))), a=conv(3, 8), n=nn.GroupNorm(groups, 8), c=conv(8, 2))
        widths.append({g.name: g.width for g in analyze(model, X)})
    assert widths == [{"a": 2}, {"a": 8}]
    plain = Way(lambda m, x: m.c(m.n(m.a(x))), a=conv(3, 8), n=nn.GroupNorm(2, 8, affine=False), c=conv(8, 2))
    assert "GroupNorm normalises over each 4 neighbouring channels" in analyze(plain, X).frozen["a"]
    over_all = Way(lambda m, x: m.c(m.n(m.a(x))), a=conv(3, 8), n=nn.GroupNorm(1, 8), c=conv(8, 2))
    assert analyze(over_all, X).frozen["a"].endswith("GroupNorm normalises over all its channels")
