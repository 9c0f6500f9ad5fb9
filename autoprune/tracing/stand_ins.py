"""Modules that take the place of those of an absent block: its branch becomes zero, and nothing of it is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import InputError
from autoprune.structure import Gives, Group

HIDDEN = "hidden_states"
"""What transformers calls the activations that a layer reads."""


class StandIn(nn.Module):
    """Gives zeros like the first tensor that it is called with, or a copy of it; with `results` in a tuple.

    A copy, for what comes next may write into it, and the block's own input goes on beside it.
    """

    def __init__(self, gives: Gives, results: int = 0) -> None:
        super().__init__()
        self.gives, self.results = gives, results

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever else it is called with has no meaning to it."""
        given = [kwargs.get(HIDDEN), *args, *kwargs.values()]
        x = next(t for t in given if isinstance(t, Tensor))
        first = torch.zeros_like(x) if self.gives == "zero" else x.clone()
        return (first, *[None] * (self.results - 1)) if self.results else first

    def extra_repr(self) -> str:
        """What it gives."""
        return f"gives={self.gives!r}"


def modules_of(model: nn.Module, groups: Iterable[Group]) -> dict[str, nn.Module]:
    """What `groups` that are blocks would put something else in place of, by path.

    Raises:
        InputError: the model has no such module.
    """
    held = dict(model.named_modules(remove_duplicate=False))
    paths = [stand.module for group in groups for stand in group.stands]
    for path in paths:
        if not path or path not in held:
            raise InputError(f"the model has no module {path!r}, which a block is made of")
    return {path: held[path] for path in paths}


def leave_out(model: nn.Module, groups: Iterable[Group]) -> None:
    """Put stand-ins where the modules of `groups` are, in place."""
    for group in groups:
        for stand in group.stands:
            _put(model, stand.module, StandIn(stand.gives, stand.results))


def put_back(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put `modules` at their paths."""
    for path, module in modules.items():
        _put(model, path, module)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module.train(model.training)
