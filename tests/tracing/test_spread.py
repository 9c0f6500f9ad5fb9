"""Tracing ends whatever meets itself, and what cannot be followed freezes what it touches and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.tracing.analyze import analyze
from tests.tracing.test_frozen import Way, conv


def half(u: Tensor) -> Tensor:
    n = u.shape[-1] // 2
    return torch.cat([-u[..., n:], u[..., :n]], -1)


def by_chunk(u: Tensor) -> Tensor:
    one, other = u.chunk(2, -1)
    return torch.cat([-other, one], -1)


def heads(y: Tensor) -> Tensor:
    return y.view(*y.shape[:2], 4, 4).transpose(1, 2)


def flat(u: Tensor) -> Tensor:
    return u.transpose(1, 2).flatten(2)


def grouped(y: Tensor) -> Tensor:
    key = heads(y)[:, :2].repeat_interleave(2, 1)
    return flat(F.scaled_dot_product_attention(heads(y), key, key))


def expanded(y: Tensor) -> Tensor:
    key = heads(y)[:, :2][:, :, None].expand(-1, -1, 2, -1, -1).reshape(y.shape[0], 4, y.shape[1], 4)
    return flat(F.scaled_dot_product_attention(heads(y), key, key))


def windows(y: Tensor) -> Tensor:
    """Shifted and back, as Swin does."""
    rolled = torch.roll(y, 1, 1).view(y.shape[0], 2, 3, 16).permute(0, 2, 1, 3)
    return torch.roll((rolled + rolled.mean(1, keepdim=True)).permute(0, 2, 1, 3).reshape(y.shape), -1, 1)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "rotary, flat": lambda y: y + half(y),
    "rotary, heads": lambda y: flat(heads(y) + half(heads(y))),
    "rotary by chunk": lambda y: flat(heads(y) + by_chunk(heads(y))),
    "rotary of neighbours": lambda y: torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2) + y,
    "repeated keys": grouped,
    "expanded keys": expanded,
    "windows": windows,
    "split with sizes, used thrice": lambda y: torch.cat([*y.split((8, 8), -1), y.split((8, 8), -1)[0]], -1)[..., :16],
}


@pytest.mark.parametrize("name", WAYS)
def test_what_meets_itself_costs_nobody_else_his_groups(name: str) -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        h = m.b(WAYS[name](m.a(x)))
        y: Tensor = m.o(h + m.down(F.silu(m.up(h))))
        return y

    torch.manual_seed(0)
    sizes = {"a": (6, 16), "b": (16, 16), "up": (16, 24), "down": (24, 16), "o": (16, 5)}
    model = Way(way, **{n: nn.Linear(*s) for n, s in sizes.items()})
    assert {"b", "up"} <= set(analyze(model, (torch.randn(2, 6, 6),)).names)


def test_a_split_with_sizes_freezes_only_what_it_touches() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        parts = list(m.a(F.relu(m.stem(x))).split((4, 4), 1))
        for layer in (m.one, m.two):
            parts.append(parts[-1] + layer(parts[-1]))
        y: Tensor = m.out(F.relu(m.join(torch.cat(parts, 1))))
        return y

    model = Way(way, stem=conv(3, 6), a=conv(6, 8), one=conv(4, 4), two=conv(4, 4), join=conv(16, 7), out=conv(7, 2))
    structure = analyze(model, (torch.randn(2, 3, 6, 6),))
    assert structure.names == ("stem", "join")
    assert structure.frozen["a"].endswith("the trace cannot follow its channels through split with sizes")


def test_a_last_token_is_no_channel() -> None:
    model = Way(lambda m, x: m.c(m.a(x).relu()[:, -1:]), a=nn.Linear(5, 8), c=nn.Linear(8, 3))
    assert analyze(model, (torch.randn(2, 6, 5),)).names == ("a",)
