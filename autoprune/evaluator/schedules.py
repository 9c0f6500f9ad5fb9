"""How the learning rate goes over a course: a warm-up, then a formula, a scheduler of torch, or a user's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from autoprune import plugins
from autoprune.errors import InputError, did_you_mean
from autoprune.evaluator.optimizers import refused

Formula = Callable[[int, int], float]
FORMULAS: Mapping[str, Formula] = {
    "cosine": lambda done, steps: 0.5 * (1 + math.cos(math.pi * done / steps)),
    "linear": lambda done, steps: 1.0 - done / steps,
    "constant": lambda done, steps: 1.0,
}
"""Share of the peak rate where `done` of the `steps` after the warm-up are over."""
LENGTHS = ("T_max", "total_steps", "total_iters")
"""Lengths of torch's schedulers: those of the course where the options do not say."""
UNFIT = {"reducelronplateau": "waits for a score; patience stops a training that gets no better"}


class Schedule(Protocol):
    """Sets the rate of each step."""

    def before(self, step: int) -> None:
        """Step number `step`, from 0, comes."""

    def after(self) -> None:
        """It was made."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where that of `state` stood."""


@dataclass(frozen=True)
class ScheduleChoice:
    """A schedule by name: cosine, linear, constant, a class of torch.optim.lr_scheduler, or a "module:factory".

    Cosine and linear fall to nothing. The class may be written in letters of any case; a factory is called with the
    optimizer, and `steps=` where it takes that; both are stepped after every step of the optimizer. `warmup` is its
    share of the steps, or their number from 1 on; None is a tenth for the first three, and nothing for the others.

    Raises:
        InputError: there is no such schedule, or it does not take these options or their values.
    """

    name: str = "cosine"
    options: Mapping[str, Any] = field(default_factory=dict)
    warmup: float | None = None

    def __post_init__(self) -> None:
        if self.name in FORMULAS:
            if self.options:
                raise InputError(f"scheduler_options: {self.name} takes none, not {', '.join(self.options)}")
        elif ":" in self.name:
            if not callable(plugins.load_object(self.name)):
                raise InputError(f"scheduler {self.name!r} must be a function (optimizer) -> a scheduler of torch")
        else:
            plugins.check_options(_found(self.name), self.options, 1, "scheduler_options")
            self._made(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9), 10)

    def build(self, optimizer: Optimizer, steps: int) -> Schedule:
        """The schedule of a course of `steps`; the rates that `optimizer` has now are the peaks.

        Raises:
            InputError: it cannot be made.
        """
        formula = FORMULAS.get(self.name)
        if formula is None:
            if (total := self.options.get("total_steps")) is not None and total < steps:
                raise InputError(f"scheduler_options: total_steps {total} ends before the {steps} steps of a course do")
            return _Stepped(optimizer, self._made(optimizer, steps), self._warm(steps, 0))
        return _Formula(optimizer, formula, max(1, self._warm(steps, steps // 10)), steps)

    def _warm(self, steps: int, usual: int) -> int:
        """Steps over which the rate rises."""
        if self.warmup is None:
            return usual
        return min(steps, int(self.warmup * steps) if self.warmup < 1.0 else int(self.warmup))

    def _made(self, optimizer: Optimizer, steps: int) -> Any:
        make = plugins.load_object(self.name) if ":" in self.name else _found(self.name)
        takes = inspect.signature(make).parameters
        if ":" in self.name:
            given: dict[str, Any] = {"steps": steps} if "steps" in takes else {}
        else:
            given = {name: steps for name in LENGTHS if name in takes}
            if make is lr_scheduler.OneCycleLR:
                given["max_lr"] = [group["lr"] for group in optimizer.param_groups]
        with refused(f"scheduler {self.name}"):
            made = make(optimizer, **{**given, **self.options})
        lacking = [name for name in ("step", "state_dict", "load_state_dict") if not hasattr(made, name)]
        if lacking:
            raise InputError(f"scheduler {self.name} gives a {type(made).__name__} without {', '.join(lacking)}")
        return made


class _Formula:
    """Rises over `warm` steps, then goes by a formula."""

    def __init__(self, optimizer: Optimizer, formula: Formula, warm: int, steps: int) -> None:
        self._optimizer, self._formula, self._warm, self._steps = optimizer, formula, warm, steps
        self._peaks = [group["lr"] for group in optimizer.param_groups]

    def before(self, step: int) -> None:
        if step < self._warm:
            share = (step + 1) / self._warm
        else:
            share = self._formula(step - self._warm, max(1, self._steps - self._warm))
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * share

    def after(self) -> None:
        """Nothing is kept from step to step."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The step says all."""


class _Stepped:
    """A scheduler of torch, stepped with the optimizer; a warm-up lowers what it says, without its knowing."""

    def __init__(self, optimizer: Optimizer, scheduler: Any, warm: int) -> None:
        self._optimizer, self._scheduler, self._warm = optimizer, scheduler, warm
        self._said: list[float] = []

    def before(self, step: int) -> None:
        self._said = [group["lr"] for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups if step < self._warm else ():
            group["lr"] *= (step + 1) / self._warm

    def after(self) -> None:
        for group, rate in zip(self._optimizer.param_groups, self._said, strict=True):
            group["lr"] = rate
        self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {"scheduler": self._scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._scheduler.load_state_dict(state["scheduler"])


def known() -> dict[str, type[lr_scheduler.LRScheduler]]:
    """Schedulers of torch by their names in small letters."""
    base = lr_scheduler.LRScheduler
    kinds = (v for v in vars(lr_scheduler).values() if isinstance(v, type) and issubclass(v, base))
    return {kind.__name__.lower(): kind for kind in kinds if kind is not base and not kind.__name__.startswith("_")}


def _found(name: str) -> type[lr_scheduler.LRScheduler]:
    kinds = known()
    if (why := UNFIT.get(name.lower())) is not None:
        raise InputError(f"scheduler {name!r} {why}")
    if name.lower() not in kinds:
        fit = [*FORMULAS, *(kind for kind in kinds if kind not in UNFIT)]
        raise InputError(f"unknown scheduler {name!r}; {did_you_mean(name.lower(), fit)}, or 'module:factory'")
    return kinds[name.lower()]
