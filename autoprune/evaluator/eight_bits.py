"""Training of weights that 8 bits hold: the model computes with integers and scales, steps are taken beside them.

The straight-through estimator (Bengio et al. 2013): gradients of the rounded weights move the exact ones, which are
rounded anew after every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autoprune.tracing.rounding import is_rounded, nearest, output_dim


class EightBits:
    """The weights of `model` that are integers with a scale an output; it shows in their numbers."""

    def __init__(self, model: nn.Module) -> None:
        layers = dict(model.named_modules())
        sides = ((p, output_dim(layers[name.rpartition(".")[0]])) for name, p in model.named_parameters())
        self._held = [(p, side, p.detach().clone()) for p, side in sides if is_rounded(p.detach(), side)]
        self._within = [value.clone() for _, _, value in self._held]

    @contextmanager
    def within(self) -> Iterator[None]:
        """What the model holds at the end, an average of its weights perhaps, it holds at the next begin again.

        Between the two it shows what 8 bits hold of it.
        """
        for (parameter, _, _), value in zip(self._held, self._within, strict=True):
            parameter.data.copy_(value)
        try:
            yield
        finally:
            self._within = [parameter.detach().clone() for parameter, _, _ in self._held]
            self._round()

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Inside, the model holds the exact weights; whatever becomes of them is rounded at the end."""
        for parameter, _, value in self._held:
            parameter.data.copy_(value)
        yield
        for parameter, _, value in self._held:
            value.copy_(parameter.detach())
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for parameter, side, _ in self._held:
            parameter.data.copy_(nearest(parameter.detach(), side).weight)

    def state(self) -> list[list[Tensor]]:
        """The exact weights, and those within."""
        return [[value for _, _, value in self._held], list(self._within)]

    def load_state(self, state: Sequence[Sequence[Tensor]]) -> None:
        """Go on with the weights of `state`."""
        exact, within = state
        for (_, _, value), old in zip(self._held, exact, strict=True):
            value.copy_(old)
        self._within = [value.clone() for value in within]
