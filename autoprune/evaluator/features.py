"""What modules inside a model give, taught by those of the dense one (Romero et al. 2015, FitNets)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import InputError, did_you_mean
from autoprune.protocols import Batch
from autoprune.tracing.inputs import call_model, on_device
from autoprune.tracing.outputs import pick_output
from autoprune.tracing.padding import without_padding

LEAST = 1e-12
"""Mean square of a dense output below which it is nothing."""
MOST_NAMED = 8


@dataclass(frozen=True)
class Features:
    """The modules that are taught, by their names in the dense model, and inputs that tell whether a model has them."""

    names: tuple[str, ...]
    dense: nn.Module
    inputs: Any

    @staticmethod
    def of(patterns: Sequence[str], dense: nn.Module, inputs: Any) -> Features:
        """The modules whose names the globs match.

        Raises:
            InputError: a glob matches no module, or one that gives no floating tensor.
        """
        known = [name for name, _ in dense.named_modules() if name]
        found: list[str] = []
        for pattern in patterns:
            matched = [name for name in known if fnmatchcase(name, pattern)]
            if not matched:
                raise InputError(f"features: {pattern!r} matches no module of the model; {_hint(pattern, known)}")
            found += [name for name in matched if name not in found]
        made = Features(tuple(found), dense, inputs)
        shapes = made._shapes(dense, found)
        if silent := [name for name in found if not shapes[name]]:
            raise InputError(f"features: module {silent[0]!r} gives no floating tensor when the model is called")
        return made

    def check(self, small: nn.Module) -> None:
        """That each of them gives in `small` what it gives in the dense model, as far as shapes tell.

        Raises:
            InputError: one was narrowed, or is gone.
        """
        both = [self._shapes(model, [n for n, _ in model.named_modules() if n]) for model in (self.dense, small)]
        wide, narrow = both
        for name in self.names:
            if narrow.get(name) != wide[name]:
                free = [n for n, shapes in wide.items() if shapes and narrow.get(n) == shapes]
                what = f"gives {list(narrow[name][0])}" if narrow.get(name) else "is gone"
                raise InputError(
                    f"features: module {name!r} {what} in the pruned model and {list(wide[name][0])} in the dense one, "
                    f"so it cannot be taught; its width stays in {_few(free)}"
                )

    @torch.no_grad()
    def _shapes(self, model: nn.Module, names: Sequence[str]) -> dict[str, list[torch.Size]]:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with noted(model, names) as seen:
            call_model(model, on_device(self.inputs, device))
        return {name: [t.shape for t in given] for name, given in zip(names, seen.by_name(), strict=True)}


class Noted:
    """What modules have given since it was made, or last asked for."""

    def __init__(self, names: Sequence[str]) -> None:
        self._held: dict[str, list[Tensor]] = {name: [] for name in names}

    def __call__(self) -> list[Tensor]:
        """All of it, module after module."""
        return [t for given in self.by_name() for t in given]

    def by_name(self) -> list[list[Tensor]]:
        """The outputs of each module, call after call."""
        held = list(self._held.values())
        self._held = {name: [] for name in self._held}
        return held

    def hook(self, name: str) -> Callable[..., None]:
        """What is called with what the module gives."""

        def note(module: nn.Module, inputs: Any, outputs: Any) -> None:
            try:
                self._held[name].append(pick_output(outputs))
            except InputError:  # without a floating tensor there is nothing to note
                return

        return note


@contextmanager
def noted(model: nn.Module, names: Sequence[str]) -> Iterator[Noted]:
    """Inside, what the modules called `names` give is noted."""
    modules, seen = dict(model.named_modules()) if names else {}, Noted(names)
    hooks = [modules[name].register_forward_hook(seen.hook(name)) for name in names if name in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def feature_loss(features: Sequence[Tensor], dense: Sequence[Tensor], batch: Batch) -> Tensor:
    """Mean over the modules of |f - d|^2 / |d|^2, over real tokens.

    A module's share is thus the same whatever the size of its numbers, which differs from layer to layer.
    """
    if len(features) != len(dense):
        raise RuntimeError(f"the modules of features are called {len(features)} times, in the dense model {len(dense)}")
    parts = []
    for mine, theirs in zip(features, dense, strict=True):
        f, d = (without_padding(t.float(), batch) for t in (mine, theirs))
        parts.append((f - d).square().mean() / d.square().mean().clamp_min(LEAST))
    return torch.stack(parts).mean()


def _hint(pattern: str, known: Sequence[str]) -> str:
    return _few(known) if any(c in pattern for c in "*?[") else did_you_mean(pattern, known)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED]) or 'no module'}{more}"
