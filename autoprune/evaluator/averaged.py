"""The exponential moving average of a model's weights while it trains (Polyak & Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autoprune.tracing.slim import named_tensors


class Average:
    """Between two steps the model holds the average, so that it is what is scored and kept; inside `training` its own.

    After t steps the decay is min(decay, (1 + t) / (10 + t)): the weights of the start, which are the worst, would else
    be most of the average of a short course. Whole numbers among the buffers are not averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay, self._updates = model, decay, 0
        # the weights that train while the average is in the model, and the other way round; tied ones once
        self._aside = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside, the model holds the weights that train."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def update(self) -> None:
        """A step was made, inside `training`."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        for name, value in named_tensors(self._model).items():
            if value.is_floating_point():
                self._aside[name].lerp_(value, 1.0 - decay)
            else:
                self._aside[name].copy_(value)

    @torch.no_grad()
    def mask(self, masks: Mapping[str, torch.Tensor]) -> None:
        """From now on these parameters are zero wherever their masks, bool, are False: in the average as well."""
        for name, alive in masks.items():
            self._aside[name].masked_fill_(~alive, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """The weights that train, which the model does not hold."""
        return {"updates": self._updates, "weights": {name: t.contiguous() for name, t in self._aside.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the average of `state` stood; the model must hold the average of then."""
        self._updates = int(state["updates"])
        for name, value in self._aside.items():
            value.copy_(state["weights"][name])

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, value in named_tensors(self._model).items():
            here = value.clone()
            value.copy_(self._aside[name])
            self._aside[name].copy_(here)
