"""Plain settings of an evaluator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from autoprune.database.store import MEMORY
from autoprune.errors import InputError, one_line
from autoprune.evaluator.precision import Wanted
from autoprune.protocols import Direction

COSTS = ("macs", "params", "bytes")
Repair = Literal["full", "norm", "none"]


@dataclass(frozen=True)
class Settings:
    """Plain settings of an evaluator.

    `loss` names a file of autoprune/losses or a user's "module:attribute", or `auto` chooses one by the outputs;
    `classes` is the outputs' axis along which it finds the classes (None: as the task says, or the usual one). With a
    `metric` of the task and its `direction` that is searched for, and `loss` only teaches the fine-tune. `precision` is
    that of forward passes and of the fine-tune, but for validation, which is always scored in float32. With
    `metrics_on_fitness` full evaluations on fitness samples carry the task's metrics too. `learning_rate` is the peak
    of the brief fine-tune, None where the evaluator is to find it. `memory`: bytes of
    level database entries that are kept. `repair` says what a candidate gets back for what it lost: compensated
    weights, corrected statistics and the refit (`full`), statistics alone (`norm`), nothing (`none`).
    """

    loss: str = "auto"
    classes: int | None = None
    metric: str | None = None
    direction: Direction | None = None
    calibration: int = 2048
    validation: int = 1024
    finetune_steps: int = 100
    costs: tuple[str, ...] = COSTS
    batch_size: int = 256
    seed: int = 0
    device: str = "auto"
    precision: Wanted = "auto"
    metrics_on_fitness: bool = False
    learning_rate: float | None = None
    memory: int = MEMORY
    repair: Repair = "full"

    @property
    def objective(self) -> str:
        """What is minimised, by name: the metric or the loss."""
        return self.loss if self.metric is None else self.metric

    def on(self, device: str) -> Settings:
        """The same on another device."""
        return replace(self, device=device)

    @property
    def torch_device(self) -> torch.device:
        """`find_device`."""
        return self.find_device()

    def find_device(self) -> torch.device:
        """The device, wherever this is called; `auto` is a GPU where there is one.

        Raises:
            InputError: there is no such device here.
        """
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(auto if self.device == "auto" else self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"evaluator.device: {self.device!r} is not to be had here: {one_line(error)}") from None
        return device
