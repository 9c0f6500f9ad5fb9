"""A model that takes tensors alone, as the formats of other libraries want it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from autoprune.tracing.inputs import arguments


class TensorsOnly(nn.Module):
    """A model that is called with the tensors among its inputs, in order; what else there is stays as it is here."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._tree = tree_flatten(arguments(model, inputs))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the inputs that it was made with."""
        return tuple(x for x in self._leaves if isinstance(x, Tensor))

    def forward(self, *tensors: Tensor) -> Any:
        """What the model gives."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(x, Tensor) else x for x in self._leaves]
        positional, keywords = tree_unflatten(leaves, self._tree)
        return self.model(*positional, **keywords)
