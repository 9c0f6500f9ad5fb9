"""Numbers of a module's own by which its forward cuts channels: found by experiment, and cut equal to a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoprune
from autoprune.errors import InputError
from autoprune.files.policy_file import load_front, save_front
from autoprune.front import Base, Front, Point
from autoprune.policy import Policy
from autoprune.structure import Size, Structure
from autoprune.tracing.analyze import analyze
from autoprune.tracing.copies import copied
from autoprune.tracing.fingerprint import weights_fingerprint
from autoprune.tracing.sizes import number_at, numbers_in
from autoprune.tracing.slim import slim
from autoprune.tracing.verify import random_keep, verify


def conv(inner: int, outer: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, kernel, padding=kernel // 2, **options)


class Scales(nn.Module):
    """Parts of one width, each convolved after the part before it was added (Res2Net)."""

    def __init__(self, width: int, scale: int = 4) -> None:
        super().__init__()
        self.width, self.scale = width, scale
        self.a = conv(3, width * scale)
        self.parts = nn.ModuleList(conv(width, width) for _ in range(scale - 1))
        self.c = conv(width * scale, 5)

    def forward(self, x: Tensor) -> Tensor:
        given = torch.split(F.relu(self.a(x)), self.width, 1)
        made, now = [], torch.zeros_like(given[0])
        for part, more in zip(self.parts, given[:-1], strict=True):
            now = F.relu(part(now + more))
            made.append(now)
        return self.c(torch.cat([*made, given[-1]], 1))


class Crossed(nn.Module):
    """Half of the channels passes a branch by; the number is that of both halves (CSP)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expanded = width
        self.a, self.branch, self.c = conv(3, width), conv(width // 2, 6), conv(width // 2 + 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        past, through = F.relu(self.a(x)).split(self.expanded // 2, 1)
        return self.c(torch.cat([past, F.relu(self.branch(through))], 1))


class Partial(nn.Module):
    """The first channels are convolved, the others go on as they are, whatever their number (FasterNet)."""

    def __init__(self, width: int, first: int) -> None:
        super().__init__()
        self.first = first
        self.a, self.b, self.c = conv(3, width), conv(first, first), conv(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.c(torch.cat([self.b(x[:, : self.first]), x[:, self.first :]], 1))


class Last(nn.Module):
    """The same, of the last channels."""

    def __init__(self, width: int, last: int) -> None:
        super().__init__()
        self.last = last
        self.a, self.b, self.c = conv(3, width), conv(last, last), conv(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.c(torch.cat([x[:, : -self.last], self.b(x[:, -self.last :])], 1))


class Ghost(nn.Module):
    """Channels and what a cheap convolution makes of each, as many as are asked for (GhostNet)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = width
        half = (width + 1) // 2
        self.a, self.cheap, self.c = conv(3, half), conv(half, half, groups=half), conv(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.c(torch.cat([x, F.relu(self.cheap(x))], 1)[:, : self.out])


class Mixed(nn.Module):
    """Depthwise convolutions of several kernels, each of its own channels (MixNet)."""

    def __init__(self, splits: list[int]) -> None:
        super().__init__()
        self.splits = splits
        self.a, self.c = conv(3, sum(splits)), conv(sum(splits), 5)
        self.parts = nn.ModuleList(conv(n, n, 2 * i + 1, groups=n) for i, n in enumerate(splits))

    def forward(self, x: Tensor) -> Tensor:
        given = torch.split(F.relu(self.a(x)), self.splits, 1)
        return self.c(torch.cat([part(x) for part, x in zip(self.parts, given, strict=True)], 1))


class Inception(nn.Module):
    """Parts of a stream go through branches of their own, and are added to it (InceptionNeXt)."""

    def __init__(self, width: int, branch: int) -> None:
        super().__init__()
        self.split_indexes = (width - 2 * branch, branch, branch)
        self.stem = conv(3, width)
        self.wide, self.high = (nn.Conv2d(branch, branch, k, padding="same", groups=branch) for k in ((1, 5), (5, 1)))
        self.up, self.down, self.c = conv(width, 9, 1), conv(9, width, 1), conv(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        one, two, three = torch.split(x, self.split_indexes, 1)
        mixed = torch.cat([one, self.wide(two), self.high(three)], 1)
        return self.c(x + self.down(F.relu(self.up(mixed))))


class Blur(nn.Module):
    """A kernel for each of a number of channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.channels = width
        self.a, self.c = conv(3, width), conv(width, 5)
        self.register_buffer("kernel", torch.rand(width, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.conv2d(F.relu(self.a(x)), self.kernel, groups=self.channels))


class Flat(nn.Module):
    """A map laid out by the number of its values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.values = width * 16
        self.a, self.c = conv(3, width), nn.Linear(self.values, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.adaptive_avg_pool2d(F.relu(self.a(x)), 4).view(-1, self.values))


class Placed(nn.Module):
    """Its forward makes a tensor of its own on the CPU."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * torch.linspace(0.5, 1, x.shape[-1]))


class Cutter(nn.Module):
    """Cuts at a number that it is given."""

    def forward(self, x: Tensor, first: int) -> tuple[Tensor, ...]:
        return x[:, :first], x[:, first:]


class Handed(nn.Module):
    """The number is held by the module around the one that cuts."""

    def __init__(self, width: int, first: int) -> None:
        super().__init__()
        self.first = first
        self.a, self.cutter, self.c, self.d = conv(3, width), Cutter(), conv(first, 5), conv(width - first, 5)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.cutter(F.relu(self.a(x)), self.first)
        return self.c(one) + self.d(other)


class Gated(nn.Module):
    """Two parts, one of them convolved, under a gate as wide as both (MambaOut)."""

    def __init__(self, width: int, convolved: int) -> None:
        super().__init__()
        self.cuts = (width, width - convolved, convolved)
        self.a, self.b, self.c = conv(3, 2 * width), conv(convolved, convolved, groups=convolved), conv(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        gate, plain, more = torch.split(F.relu(self.a(x)), self.cuts, 1)
        return self.c(torch.sigmoid(gate) * torch.cat([plain, self.b(more)], 1))


class Decoder(nn.Module):
    """What a linear layer makes is laid out as a map of a number of channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.channels = width
        self.a, self.c = nn.Linear(192, width * 16), conv(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.a(x.flatten(1))).view(-1, self.channels, 4, 4))


class Grouped(nn.Module):
    """A shuffle by a number of groups, which is none of channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.groups = 2
        self.a, self.b, self.c = conv(3, width), conv(width, width, groups=2), conv(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.c(F.relu(self.b(x)))


class Written(nn.Module):
    """The first channels are overwritten by what is made of them."""

    def __init__(self, width: int, first: int) -> None:
        super().__init__()
        self.first = first
        self.a, self.b, self.c = conv(3, width), conv(first, first), conv(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x)).clone()
        x[:, : self.first] = self.b(x[:, : self.first].clone())
        return self.c(x)


class Between(nn.Module):
    """The number of a middle part counts from where that of the first one ends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = 3, 4
        self.a, self.b, self.c = conv(3, 12), conv(4, 6), conv(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, end = F.relu(self.a(x)), self.first + self.second
        return self.c(torch.cat([x[:, : self.first], self.b(x[:, self.first : end]), x[:, end:]], 1))


@dataclass(frozen=True)
class Kind:
    """How to make a model; the groups that its numbers follow, and what every number counts in each of these."""

    make: Callable[[], nn.Module]
    counts: dict[str, tuple[Size, ...]]


KINDS = {
    "res2net": Kind(lambda: Scales(6), {"1.a": (Size("1.width", 6),)}),
    "csp": Kind(lambda: Crossed(16), {"1.a": (Size("1.expanded", 16, each=2),)}),
    "fasternet": Kind(lambda: Partial(11, 4), {"1.a": (Size("1.first", 4),), "1.a#2": ()}),
    "last": Kind(lambda: Last(11, 4), {"1.a#2": (Size("1.last", 4),)}),
    "ghost": Kind(lambda: Ghost(12), {"1.a": ()}),  # all that there is fits into what is asked for
    "mixnet": Kind(
        lambda: Mixed([5, 4, 3]),
        {name: (Size("1.splits", 5 - i, i),) for i, name in enumerate(("1.a", "1.a#2", "1.a#3"))},
    ),
    "inception": Kind(
        lambda: Inception(16, 4),
        {f"1.stem{n}": (Size("1.split_indexes", v, i),) for i, (n, v) in enumerate((("", 8), ("#2", 4), ("#3", 4)))},
    ),
    "blur": Kind(lambda: Blur(7), {"1.a": (Size("1.channels", 7),)}),
    "flat": Kind(lambda: Flat(6), {"1.a": (Size("1.values", 96, each=16),)}),
    "handed": Kind(lambda: Handed(9, 4), {"1.a": (Size("1.first", 4),)}),
    "placed": Kind(lambda: Placed(Partial(9, 4)), {"1.inner.a": (Size("1.inner.first", 4),), "1.inner.a#2": ()}),
    "decoder": Kind(lambda: Decoder(6), {"1.a": (Size("1.channels", 6),)}),
    "grouped": Kind(lambda: Grouped(12), {"1.a": (), "1.b": ()}),
    "written": Kind(lambda: Written(9, 4), {"1.a": (Size("1.first", 4),), "1.a#2": ()}),
    "between": Kind(Between, {"1.a": (Size("1.first", 3),), "1.a#2": (Size("1.second", 4),), "1.a#3": ()}),
    "gated": Kind(
        lambda: Gated(7, 3),
        {"1.a": (Size("1.cuts", 7, 0), Size("1.cuts", 4, 1)), "1.a#2": (Size("1.cuts", 7, 0), Size("1.cuts", 3, 2))},
    ),
}


@cache
def dense(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(conv(3, 3), KINDS[kind].make()).eval()


@cache
def found(kind: str) -> Structure:
    return analyze(dense(kind), example())


def example() -> tuple[Tensor]:
    return (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)


def cut(kind: str, seed: int) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    """A slim copy, and the atoms that it keeps."""
    keep = random_keep(found(kind).groups, np.random.default_rng(seed))
    small = copied(dense(kind))
    slim(small, found(kind), keep)
    return small, keep


def front_of(kind: str, keep: dict[str, tuple[int, ...]]) -> Front:
    """A front of one point, as a search would leave it."""
    structure, model = found(kind), dense(kind)
    costs = {"macs": 2, "params": sum(p.numel() for p in model.parameters())}
    base = Base(
        structure.fingerprint,
        weights_fingerprint(model),
        "tests:kind",
        ({"shape": [2, 3, 8, 8], "dtype": "float32"},),
        costs,
        {"validation": {}},
        structure.groups,
        {"criterion": "l1_norm"},
        "sha256:0",
    )
    policy = Policy.of({name: len(kept) for name, kept in keep.items()})
    losses = {"validation": {"name": "kl", "loss": 0.1}}
    point = Point("p00", policy, keep, {**costs, "macs_ratio": 1.0}, losses=losses, metrics={}, trial=0, base=base)
    return Front((point,), base, {}, {})


@pytest.mark.parametrize("kind", KINDS)
def test_the_groups_on_both_sides_of_a_cut_are_found_with_the_numbers_that_follow_them(kind: str) -> None:
    structure = found(kind)
    assert all(reason.endswith("its channels are the model's output") for reason in structure.frozen.values())
    assert {name: structure.group(name).sizes for name in KINDS[kind].counts} == KINDS[kind].counts
    assert all(not g.sizes for g in structure if g.name not in KINDS[kind].counts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_at_random_on_both_sides_is_the_same_as_a_mask(kind: str) -> None:
    for seed in range(6):
        small, keep = cut(kind, seed)
        assert verify(small, dense(kind), found(kind), keep, example()) < 1e-5
        for size, left in numbers_left(found(kind), keep).items():
            assert number_at(small, *size) == left


def numbers_left(structure: Structure, keep: dict[str, tuple[int, ...]]) -> dict[tuple[str, int | None], int]:
    left: dict[tuple[str, int | None], int] = {}
    for group in structure:
        for s in group.sizes:
            was = left.get((s.attribute, s.index), s.value)
            left[s.attribute, s.index] = was - s.each * (group.width - len(keep[group.name]))
    return left


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_comes_back_with_its_numbers(kind: str, tmp_path: Path) -> None:
    front = front_of(kind, cut(kind, 3)[1])
    save_front(front, tmp_path / "policy.json")
    again = load_front(tmp_path / "policy.json")
    assert again.base.groups == front.base.groups
    with pytest.warns(UserWarning, match="only slices"):
        small = autoprune.apply(again[0], dense(kind), example())
    autoprune.save(small, tmp_path / "small")
    x = example()
    with torch.no_grad():
        expected = small(*x)
        assert torch.equal(autoprune.load(tmp_path / "small", factory=lambda: copied(dense(kind)))(*x), expected)
        assert torch.equal(autoprune.load_applied(tmp_path / "small", dense(kind), x)(*x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_lent_model_keeps_its_numbers(kind: str) -> None:
    model = dense(kind)
    before = {name: list(numbers_in(m)) for name, m in model.named_modules()}
    analyze(model, example())
    assert {name: list(numbers_in(m)) for name, m in model.named_modules()} == before


class Other(nn.Module):
    """Its number is used for something else, too."""

    def __init__(self) -> None:
        super().__init__()
        self.half = 4
        self.a, self.c = conv(3, 8), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        one, other = F.relu(self.a(x)).split(self.half, 1)
        return self.c(one / self.half + other)


def test_a_number_that_means_more_than_a_place_is_found_out() -> None:
    torch.manual_seed(0)
    structure = analyze(Other(), example())
    assert structure.names == ()
    assert structure.frozen["a"].startswith("its channels are split at a fixed place (split)")


def test_a_model_with_another_number_is_told_so() -> None:
    point = front_of("mixnet", cut("mixnet", 0)[1])[0]
    other = copied(dense("mixnet"))
    other[1].splits = [4, 5, 3]  # type: ignore[index]
    with pytest.raises(InputError, match=r"1\.a: policy says 1\.splits\[0\] is 5, the model has 4"):
        autoprune.apply(point, other, example())
    del other[1].splits  # type: ignore[index]
    with pytest.raises(InputError, match=r"1\.splits\[0\] is 5, the model has None"):
        autoprune.apply(point, other, example())
