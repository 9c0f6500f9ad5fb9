"""Recoveries, one file each: how a pruned model is trained back. Here is how one is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from autoprune import plugins
from autoprune.protocols import Progress, Recovery, Task


def build_recovery(schedule: str, options: Mapping[str, Any]) -> Watched:
    """The recovery called `schedule`, a file of this folder or a user's "module:Class", with its options.

    Raises:
        InputError: no such recovery, it is no class, or it does not take these options or their values.
    """
    return Watched(schedule, plugins.build("recovery", schedule, options, "recovery.options"))


@dataclass(frozen=True)
class Watched:
    """The recovery called `name`, whose mistakes name it; a loss that is no number any more is no mistake."""

    name: str
    recovery: Recovery

    def __call__(self, model: nn.Module, dense: nn.Module, task: Task, steps: int, seed: int) -> Iterator[Progress]:
        """Train as the recovery does.

        Raises:
            PluginError: it fails, or does not do what a recovery must.
            ArithmeticError: the loss is not finite.
        """
        with plugins.calling("recovery", self.name, "while it trains", spared=(ArithmeticError,)):
            for progress in self.recovery(model, dense, task, steps, seed):
                if not isinstance(progress, Progress):
                    raise TypeError(f"it yields a {type(progress).__name__}, not a Progress")
                if model.training:
                    raise ValueError(f"the model is in training mode after step {progress.step}")
                yield progress
