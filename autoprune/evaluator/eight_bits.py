"""Training of weights that 8 bits hold: the model computes with integers and scales, steps are taken beside them.

The straight-through estimator (Bengio et al. 2013): gradients of the rounded weights move the exact ones, which are
rounded anew after every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autoprune.matrices import output_dim
from autoprune.tracing.rounding import nearest


class EightBits:
    """The weights of `model` that are integers with a scale an output; it shows in their numbers."""

    def __init__(self, model: nn.Module) -> None:
        layers = {f"{name}.weight".lstrip("."): type(module).__name__ for name, module in model.named_modules()}
        sides = ((p, output_dim(layers.get(name, ""))) for name, p in model.named_parameters() if p.dim() > 1)
        self._held = [(p, side, p.detach().clone()) for p, side in sides if _is_rounded(p.detach(), side)]

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Inside, the model holds the exact weights; whatever becomes of them is rounded at the end."""
        for parameter, _, value in self._held:
            parameter.data.copy_(value)
        yield
        for parameter, _, value in self._held:
            value.copy_(parameter.detach())
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """Make the model's weights what 8 bits hold; those that are so already do not change."""
        for parameter, side, _ in self._held:
            parameter.data.copy_(nearest(parameter.detach(), side).weight)

    def state(self) -> list[Tensor]:
        """The exact weights."""
        return [value for _, _, value in self._held]

    def load_state(self, state: Sequence[Tensor]) -> None:
        """Go on with the exact weights of `state`."""
        for (_, _, value), old in zip(self._held, state, strict=True):
            value.copy_(old)


def _is_rounded(weight: Tensor, side: int) -> bool:
    return weight.dtype == torch.float32 and bool(weight.any()) and torch.equal(nearest(weight, side).weight, weight)
