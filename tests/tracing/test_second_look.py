"""Channels that torch-pruning's graph loses or couples wrongly: followed by labels, proved, and cut equal to a mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.structure import Structure
from autoprune.tracing.analyze import analyze
from autoprune.tracing.copies import private_copy
from autoprune.tracing.slim import named_tensors, positions_of, slim
from autoprune.tracing.verify import random_keep, verify


class Way(nn.Module):
    """Named modules and a forward given as a function of the model and its input."""

    def __init__(self, way: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.way = way
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def conv(inner: int, outer: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, padding=1, **options)


def between(middle: nn.Module, width: int = 8, out: int = 8) -> nn.Module:
    """`a` -> `middle` -> `c` -> `d`."""
    way = lambda m, x: m.d(F.relu(m.c(m.middle(F.relu(m.a(x))))))  # noqa: E731
    return Way(way, a=conv(3, width), middle=middle, c=conv(out, 7), d=conv(7, 5))


def shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def unshuffled_by_hand(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    x = x.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // 4, 2 * h, 2 * w)


def focused(x: Tensor) -> Tensor:
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


def gated(x: Tensor) -> Tensor:
    one, other = x.chunk(2, 1)
    return one * torch.sigmoid(other)


def behind_zeros(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(len(x), 3, *x.shape[2:]), x], 1)


def in_place(x: Tensor) -> Tensor:
    """Channels are written into a larger tensor."""
    out = x.new_zeros(len(x), x.shape[1] + 4, *x.shape[2:])
    out[:, 4:] = x
    return out


class Frozen(nn.Module):
    """Batch norm as buffers, as detectors have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class Blur(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.ones(width, 1, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1, groups=x.shape[1])


class Listed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.rand(width, 1, 1) + 0.5) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scales[0] + self.scales[1]


class Selective(nn.Module):
    """Attention between two branches, channel by channel (SKNet)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = conv(width, width), nn.Conv2d(width, width, 3, padding=2, dilation=2)
        self.squeeze, self.excite = nn.Linear(width, 6), nn.Linear(6, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([F.relu(self.one(x)), F.relu(self.two(x))], 1)
        scores = self.excite(F.relu(self.squeeze(both.sum(1).mean((2, 3)))))
        shares = scores.unflatten(1, (2, -1)).softmax(1)
        return (both * shares[..., None, None]).sum(1)


class Map(nn.Module):
    """A linear layer whose output is viewed as a map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3))).view(len(x), -1, 2, 2)


MIDDLES: Mapping[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "padded before and behind": (lambda: Function(lambda x: F.pad(x, (0, 0, 0, 0, 2, 2))), 8, 12, 8),
    "concatenated with zeros": (lambda: Function(behind_zeros), 8, 11, 8),
    "written into zeros": (lambda: Function(in_place), 8, 12, 8),
    "pixel shuffle": (lambda: nn.PixelShuffle(2), 24, 6, 6),
    "pixel shuffle by hand": (lambda: Function(unshuffled_by_hand), 24, 6, 6),
    "pixel unshuffle": (lambda: nn.PixelUnshuffle(2), 6, 24, 6),
    "space to depth by hand": (lambda: Function(focused), 6, 24, 6),
    "channel shuffle": (lambda: nn.ChannelShuffle(2), 8, 8, 4),
    "channel shuffle by hand": (lambda: Function(shuffled), 8, 8, 4),
    "glu": (lambda: nn.GLU(1), 16, 8, 8),
    "gate by chunks": (lambda: Function(gated), 16, 8, 8),
    "group norm": (lambda: nn.GroupNorm(4, 8), 8, 8, 4),
    "group norm of each channel": (lambda: nn.GroupNorm(8, 8), 8, 8, 8),
    "instance norm": (lambda: nn.InstanceNorm2d(8, affine=True), 8, 8, 8),
    "depthwise with a multiplier": (lambda: conv(8, 24, groups=8), 8, 24, 8),
    "group norm, then a multiplier": (
        lambda: nn.Sequential(nn.GroupNorm(4, 8), nn.ReLU(), conv(8, 24, groups=8)),
        *(8, 24, 4),
    ),
    "frozen batch norm": (lambda: Frozen(8), 8, 8, 8),
    "blur by a buffer": (lambda: Blur(8), 8, 8, 8),
    "parameters in a list": (lambda: Listed(8), 8, 8, 8),
    "selective kernels": (lambda: Selective(8), 8, 8, 8),
    "linear viewed as a map": (lambda: Map(8), 8, 8, 8),
}


def cut(model: nn.Module, inputs: tuple[Tensor, ...], seed: int = 0) -> Structure:
    """Analyse, cut every group at random, and compare with a mask of this file's own."""
    model.eval()
    structure = analyze(model, inputs)
    keep = random_keep(structure.groups, np.random.default_rng(seed))
    small, reference = private_copy(model), private_copy(model)
    slim(small, structure, keep)
    verify(small, model, structure, keep, inputs)
    tensors = named_tensors(reference)
    with torch.no_grad():
        for group in structure:
            gone = torch.tensor(sorted(set(range(group.width)) - set(keep[group.name])), dtype=torch.long)
            for s in group.slices:
                if s.role == "consume":
                    tensors[s.tensor].index_fill_(s.dim, positions_of(s, gone), 0)
        other = torch.randn(3, *inputs[0].shape[1:], generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(small(other), reference(other), rtol=1e-4, atol=1e-5)
    return structure


@pytest.mark.parametrize("name", MIDDLES)
def test_channels_go_through_it_and_are_cut_like_their_mask(name: str) -> None:
    build, width, out, atoms = MIDDLES[name]
    torch.manual_seed(0)
    structure = cut(between(build(), width, out), (torch.randn(2, 3, 8, 8),))
    assert {g.name: g.width for g in structure}["a"] == atoms
    assert "c" in structure.names
    assert "a" not in structure.frozen


def test_both_sides_of_a_padding_that_follows_the_width_shrink_together() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        y = m.b(x)
        more = (y.shape[1] - x.shape[1]) // 2
        z: Tensor = m.c(F.relu(y + F.pad(x, (0, 0, 0, 0, more, more))))
        return z

    torch.manual_seed(0)
    structure = cut(Way(way, a=conv(3, 8), b=conv(8, 16), c=conv(16, 5)), (torch.randn(2, 3, 8, 8),))
    assert {g.name: g.width for g in structure} == {"a": 8, "b": 4}
    reads = [(s.offset, s.repeat) for s in structure.group("b").slices if s.role == "consume"]
    assert reads == [(0, 1), (12, 1)]
    assert [s.offset for s in structure.group("a").slices if s.tensor == "c.weight"] == [4]


def test_halves_of_a_chunk_shrink_together() -> None:
    """A CSP block: one half goes through a bottleneck, all is concatenated."""

    def way(m: Any, x: Tensor) -> Tensor:
        parts = list(F.relu(m.a(x)).chunk(2, 1))
        parts.append(parts[-1] + m.b(parts[-1]))
        y: Tensor = m.c(torch.cat(parts, 1))
        return y

    torch.manual_seed(0)
    structure = cut(Way(way, a=conv(3, 12), b=conv(6, 6), c=conv(18, 5)), (torch.randn(2, 3, 8, 8),))
    assert {g.name: g.width for g in structure} == {"a": 6}


def test_one_parameter_in_two_modules_is_narrowed_once() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.c(F.relu(m.one(x)) + F.relu(m.two(x * x)))
        return y

    torch.manual_seed(0)
    model = Way(way, one=conv(3, 8), two=conv(3, 8), c=conv(8, 5))
    model.two.weight = model.one.weight
    structure = cut(model, (torch.randn(2, 3, 8, 8),))
    assert {g.name: g.width for g in structure} == {"one": 8}


def test_a_forward_that_the_probe_cannot_follow_keeps_what_the_first_look_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*args: Any) -> Any:
        raise NotImplementedError("an operator without a kernel")

    monkeypatch.setattr("autoprune.tracing.second_look.probed", refused)
    torch.manual_seed(0)
    structure = analyze(between(Function(lambda x: F.pad(x, (0, 0, 0, 0, 2, 2))), 8, 12), (torch.randn(2, 3, 8, 8),))
    assert structure.names == ("c",)
    assert "padded" in structure.frozen["a"]
