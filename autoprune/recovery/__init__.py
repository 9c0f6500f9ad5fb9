"""Recoveries, one file each: how a pruned model is trained back. Here is how one is built."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from autoprune import plugins
from autoprune.errors import InputError, did_you_mean
from autoprune.policy import Policy
from autoprune.protocols import Progress, Recovery, Task, ThinningRecovery
from autoprune.recovery._distilled import WHERE, Distilled, Masked
from autoprune.structure import Structure

COURSE = "course"
"""The parameter, and the attribute, of a recovery that holds the options of its courses."""
SHARED = frozenset(f.name for f in fields(Distilled) if f.repr)


def build_recovery(schedule: str, options: Mapping[str, Any]) -> Watched:
    """The recovery called `schedule`, a file of this folder or a user's "module:Class", with its options.

    Those of its courses go together into one `Distilled`, where it asks for that.

    Raises:
        InputError: no such recovery, it is no class, or it does not take these options or their values.
    """
    own = _parameters(plugins.load("recovery", schedule))
    if COURSE not in own:
        return Watched(schedule, plugins.build("recovery", schedule, options, WHERE))
    known = {*own, *SHARED} - {COURSE}
    if foreign := [name for name in options if name not in known]:
        raise InputError(f"{WHERE}: unknown option {foreign[0]!r}; {did_you_mean(foreign[0], known)}")
    shared = {name: value for name, value in options.items() if name in SHARED and name not in own}
    mine = {name: value for name, value in options.items() if name in own}
    return Watched(schedule, plugins.build("recovery", schedule, {**mine, COURSE: Distilled(**shared)}, WHERE))


@dataclass(frozen=True)
class Watched:
    """The recovery called `name`, whose mistakes name it; a loss that is no number any more is no mistake."""

    name: str
    recovery: Recovery

    @property
    def course(self) -> Distilled | None:
        """What its options say of its courses, where it trains by that."""
        found = getattr(self.recovery, COURSE, None)
        return found if isinstance(found, Distilled) else None

    def at_rate(self, rate: float) -> None:
        """Its courses have this peak rate from now on."""
        if self.course is not None:
            setattr(self.recovery, COURSE, replace(self.course, learning_rate=rate))

    def at_point(self, masks: Mapping[str, Tensor], patterns: Mapping[str, str]) -> None:
        """Its courses are those of a model whose weights have these masks, in these patterns, from now on."""
        if self.course is not None:
            point = {name: Masked(mask, patterns.get(name, "")) for name, mask in masks.items()}
            setattr(self.recovery, COURSE, replace(self.course, point=point))

    def check(self, dense: nn.Module) -> None:
        """Have it look at what it needs, before any work.

        Raises:
            InputError: that is not there, or does not fit the dense model.
        """
        check = getattr(self.recovery, "check", None)
        if callable(check):
            with plugins.before_work(), plugins.calling("recovery", self.name, "before any work", (InputError,)):
                check(dense)

    def check_policy(self, structure: Structure, policy: Policy) -> None:
        """Have it look at the point that it shall train, before any work.

        Raises:
            InputError: it is none for this recovery.
        """
        check = getattr(self.recovery, "check_policy", None)
        if callable(check):
            with plugins.before_work(), plugins.calling("recovery", self.name, "before any work", (InputError,)):
                check(structure, policy)

    def __call__(self, model: nn.Module, dense: nn.Module, task: Task, steps: int, seed: int) -> Iterator[Progress]:
        """Train as the recovery does.

        Raises:
            PluginError: it fails, or does not do what a recovery must.
            ArithmeticError: the loss is not finite.
        """
        yield from self.watched(self.begun(model, dense, task, steps, seed), model)

    def begun(
        self, model: nn.Module, dense: nn.Module, task: Task, steps: int, seed: int, whole: nn.Module | None = None
    ) -> Iterable[Progress]:
        """Its training, to be `watched`; `whole` is that of a `ThinningRecovery`."""
        made = self.recovery
        with plugins.calling("recovery", self.name, "as it begins", (ArithmeticError, InputError)):
            if whole is not None and isinstance(made, ThinningRecovery):
                return made.thin(model, whole, dense, task, steps, seed)
            return made(model, dense, task, steps, seed)

    def watched(self, training: Iterable[Progress], model: nn.Module) -> Iterator[Progress]:
        """What `training` of `model`, one of this recovery, yields.

        Raises:
            PluginError: it fails, or does not do what a recovery must.
            ArithmeticError: the loss is not finite.
        """
        with plugins.calling("recovery", self.name, "while it trains", spared=(ArithmeticError,)):
            for progress in training:
                if not isinstance(progress, Progress):
                    raise TypeError(f"it yields a {type(progress).__name__}, not a Progress")
                if model.training:
                    raise ValueError(f"the model is in training mode after step {progress.step}")
                yield progress


def takes(schedule: str, option: str) -> bool:
    """Whether the recovery called `schedule` has an option of its own by this name."""
    return option in _parameters(plugins.load("recovery", schedule))


def _parameters(make: Any) -> frozenset[str]:
    """The names of what a class is built with."""
    try:
        return frozenset(inspect.signature(make).parameters)
    except (TypeError, ValueError):
        return frozenset()
