"""Tiny linear networks whose scores can be worked out on paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoprune import plugins
from autoprune.protocols import Batch, Direction
from autoprune.structure import Group, Slice


@dataclass(frozen=True)
class Squares:
    """Half the squared error, a sum over outputs and a mean over samples; `batches` are the calibration split."""

    model: nn.Module
    batches: Sequence[Batch]
    directions: Mapping[str, Direction]

    def build(self) -> nn.Module:
        return self.model

    def example_inputs(self) -> tuple[Tensor, ...]:
        return (self.batches[0][0],)

    def split(self, name: str) -> Iterable[Batch]:
        assert name == "calibration", "a criterion may read no other split"
        return self.batches

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        out: Tensor = model(batch[0])
        return out

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return (self.outputs(model, batch) - batch[1]).square().flatten(1).sum(1).mean() / 2

    def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        raise AssertionError("no criterion asks for metrics")


def task_of(model: nn.Module, *batches: tuple[Any, Any]) -> Squares:
    """The task of batches of (inputs, targets), as lists."""
    return Squares(model, [(torch.tensor(x), torch.tensor(y)) for x, y in batches], {})


def linear(*rows: Sequence[float]) -> nn.Linear:
    """y = W x with these rows."""
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight = nn.Parameter(torch.tensor(rows, dtype=torch.float32))
    return layer


PLAIN = linear((2.0, -1.0))
ONE, TWO = ([[1.0, 2.0]], [[1.0]]), ([[3.0, 0.0]], [[5.0]])
"""w = (2, -1). Sample (1, 2) -> 1: output 0, residual -1, gradient (-1, -2); sample (3, 0) -> 5: 6, 1 and (3, 0)."""
APART = task_of(PLAIN, ONE, TWO)
"""Two batches of one sample; the mean gradient is (1, -1)."""
TOGETHER = task_of(PLAIN, (ONE[0] + TWO[0], ONE[1] + TWO[1]))
"""The same in one batch."""

ROWS = linear((2.0, -1.0), (0.0, 3.0))
ATOMS = task_of(ROWS, ([[1.0, 2.0]], [[1.0, 5.0]]))
"""Outputs (0, 6), residuals (-1, 1), gradient ((-1, -2), (1, 2)), so w * gradient = ((-2, 2), (0, 6))."""
GROUP = Group("rows", "channel", 2, (Slice("weight", 0, "produce"),), (1, 2))


def weights(name: str, task: Squares = APART, **options: Any) -> list[Any]:
    """The scores of the one weight of the task's model."""
    found: Tensor = plugins.load("criteria", name)(**options).weights(task.model, ["weight"], task)["weight"]
    values: list[Any] = found.tolist()
    return values


def atoms(name: str, **options: Any) -> list[float]:
    """The scores of the two rows of `ROWS`."""
    found: Tensor = plugins.load("criteria", name)(**options)(ROWS, [GROUP], ATOMS)[GROUP.name]
    values: list[float] = found.tolist()
    return values
