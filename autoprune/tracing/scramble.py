"""Weights and inputs of our own for experiments: what holds on them holds for the model, however it was trained."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

STATISTICS = ("running_mean", "running_var")
MOST_DRAWN = 4_194_301
"""Numbers drawn for one tensor, which a larger one repeats: a prime, so that no two rows or columns hold the same."""

NOISE = 0.5
"""Of an input's own size; zeros and constants, which people give, would leave whole layers dead."""


def scramble(model: nn.Module, number: int) -> None:
    """Give every floating parameter and norm statistic new values, the same ones for the same `number`.

    Signs and values are drawn anew, because trained units may be dead and fresh branches end in a zero scale: they
    would prove anything. Sizes stay near those of the model, within what keeps signals alive.
    """
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel():
                _redraw(parameter.data, generator)
        for name, tensor in model.named_buffers():
            kind = name.rsplit(".", 1)[-1]
            if kind in STATISTICS and tensor.is_floating_point() and tensor.numel():
                spread = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(spread + 0.5 if kind == "running_var" else 0.4 * (spread - 0.5))


def noisy(inputs: Any) -> Any:
    """The same tree of inputs with noise on the floating ones."""
    generator = torch.Generator().manual_seed(0)

    def shaken(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            return value
        size = float(value.double().square().mean().sqrt()) or 1.0
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return value + (NOISE * size * noise).to(value)

    return tree_map(shaken, inputs)


def _redraw(tensor: Tensor, generator: torch.Generator) -> None:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    size = float(torch.linalg.vector_norm(tensor, dtype=wide)) / tensor.numel() ** 0.5
    if tensor.dim() == 0:  # temperatures and the like keep their sign
        tensor.copy_(tensor * (0.5 + float(torch.rand((), generator=generator))) if size else tensor + 0.1)
        return
    values = torch.randn(min(tensor.numel(), MOST_DRAWN), generator=generator)
    if sum(n > 1 for n in tensor.shape) > 1:
        natural = float(prod(tensor.shape[1:])) ** -0.5
        values *= _within(size, natural / 3, 3 * natural)
    else:  # a scale or a bias: no value near zero, the channel would hardly count
        values = _within(size, 0.1, 1.0) * values.sign() * (0.5 + values.abs())
    fresh = tensor if tensor.is_contiguous() else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    for part in fresh.view(-1).split(len(values)):
        part.copy_(values[: len(part)])
    if fresh is not tensor:
        tensor.copy_(fresh)


def _within(value: float, least: float, most: float) -> float:
    return min(max(value, least), most)
