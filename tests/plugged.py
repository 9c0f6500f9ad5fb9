"""Plug-ins of a user's own, for the tests that lead one all the way: named as "tests.plugged:Rough" and so on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.evaluation import Ask, Evaluation
from autoprune.executors.inline import Inline
from autoprune.policy import IntArray, Policy
from autoprune.protocols import EvaluatorFactory, FloatArray, Task, WorkerState
from autoprune.structure import Group, Structure
from tests.small import RandomTask


def mlp() -> RandomTask:
    """A task of two hidden layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)]
    return RandomTask(nn.Sequential(*layers), (12,), samples=32)


class Rough:
    """A cost that is not monotone: an odd width wastes three atoms."""

    monotone = False

    def __init__(self, structure: Structure) -> None:
        self.dense = 1.0
        self.dense = float(self(Policy.dense(structure).array(structure)))

    def __call__(self, widths: IntArray) -> FloatArray:
        """Widths [..., groups] -> ratio [...]."""
        widths = np.asarray(widths)
        return np.asarray((widths + 3.0 * (widths % 2)).sum(-1) / self.dense)


class Tilted:
    """A criterion with an option: later atoms first, or by the `sign` earlier ones."""

    def __init__(self, sign: float = 1.0) -> None:
        self.sign = sign

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        """Group -> scores [width]."""
        return {g.name: self.sign * torch.linspace(1, 2, g.width) for g in groups}


class Slow:
    """An executor with an option: this process, which naps before each ask."""

    naps = 0

    def __init__(
        self,
        make_evaluator: EvaluatorFactory,
        workers: int = 1,
        timeout_s: float = 600.0,
        retries: int = 2,
        *,
        nap_s: float = 0.0,
    ) -> None:
        self._inline, self._nap_s, self.slots = Inline(make_evaluator, retries), nap_s, 1

    def submit(self, index: int, ask: Ask) -> None:
        """Nap, then queue."""
        if self._nap_s:
            time.sleep(self._nap_s)
            Slow.naps += 1
        self._inline.submit(index, ask)

    def next_done(self, timeout: float | None = None) -> tuple[int, Evaluation] | None:
        return self._inline.next_done(timeout)

    def cancel(self, index: int) -> None:
        self._inline.cancel(index)

    def close(self) -> None:
        self._inline.close()

    def workers(self) -> Sequence[WorkerState]:
        return self._inline.workers()

    @property
    def retried(self) -> int:
        return self._inline.retried


class Half:
    """A half, three quarters or all of a group, and all of the first one."""

    def restrict(self, structure: Structure) -> Structure:
        """The grids of that."""
        first, *rest = structure.groups
        halved = tuple(replace(g, grid=(g.width // 2, 3 * g.width // 4, g.width)) for g in rest)
        frozen = {**structure.frozen, first.name: "less of it would not do"}
        return Structure(halved, structure.ops, frozen, structure.fingerprint)


def stopwatch(model: nn.Module, inputs: tuple[Any, ...], threads: int) -> Callable[[], object]:
    """A runtime: the model as torch runs it."""

    def once() -> None:
        with torch.inference_mode():
            model(*inputs)

    return once


def convolving() -> RandomTask:
    """A task of two convolutions of 32 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()]
        return RandomTask(nn.Sequential(*inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3)), (3, 8, 8), 32)


class Stepped:
    """A runtime that computes eight channels at a time, and notes on how many threads it was made."""

    step: Any = 8
    threads: ClassVar[set[int]] = set()

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], threads: int) -> Callable[[], object]:
        """As the stopwatch."""
        self.threads.add(threads)
        assert torch.get_num_threads() == threads
        return stopwatch(model, inputs, threads)

    def operation(self, module: nn.Module, x: Tensor, threads: int) -> Callable[[], object]:
        """The same."""
        return self(module, (x,), threads)
