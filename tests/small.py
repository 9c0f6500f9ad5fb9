"""A task over any model with random inputs: what the tests of database, criteria and evaluation run on."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.database.batches import Parts, StatisticsOnly
from autoprune.protocols import Batch, Direction
from autoprune.space import Space, restrict
from autoprune.structure import Structure
from autoprune.tracing.analyze import analyze
from tests.families import FAMILIES

SEEDS = {"calibration": 1, "validation": 2, "test": 3, "train": 4}


@dataclass(frozen=True)
class RandomTask:
    """Random inputs, targets from the dense model itself, so that its accuracy is 1."""

    model: nn.Module
    shape: tuple[int, ...]
    samples: int = 64

    @property
    def directions(self) -> Mapping[str, Direction]:
        return {"accuracy": "maximize"}

    def build(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def example_inputs(self) -> tuple[Tensor, ...]:
        return (self._inputs("calibration")[:2],)

    def split(self, name: str) -> Iterable[Batch]:
        x = self._inputs(name)
        with torch.no_grad():
            y = self.model.eval()(x).flatten(1).argmax(1)
        return list(zip(x.split(16), y.split(16), strict=True))

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        out: Tensor = model(batch[0])
        return out

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self.outputs(model, batch).flatten(1), batch[1])

    def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        with torch.no_grad():
            hits = [(self.outputs(model, b).flatten(1).argmax(1) == b[1]).float().mean() for b in batches]
        return {"accuracy": float(torch.stack(hits).mean())}

    def _inputs(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(SEEDS[name])
        return torch.randn(self.samples, *self.shape, generator=generator)


@dataclass(frozen=True)
class World:
    """A family's model with its task, structure (all widths) and statistics samples."""

    task: RandomTask
    model: nn.Module
    structure: Structure
    seen: StatisticsOnly

    @property
    def statistics(self) -> Batch:
        """The statistics samples in one batch."""
        return self.seen.statistics[0]


def world(family: str, samples: int = 64, space: Space | None = None) -> World:
    """The family called `family`, analysed, in channels_last."""
    f = FAMILIES[family]
    return world_of(f.build().eval(), f.shape, samples, space)


def world_of(built: nn.Module, shape: tuple[int, ...], samples: int = 64, space: Space | None = None) -> World:
    """The same for any model with one input of `shape` a sample."""
    task = RandomTask(built, shape, samples)
    model = task.build().to(memory_format=torch.channels_last).eval()
    structure = restrict(analyze(model, task.example_inputs()), space or Space(max_sparsity=0.99))
    parts = Parts.of(task, samples, 16)
    return World(task, model, structure, StatisticsOnly(task, parts.statistics, 16))


def student_of(w: World) -> nn.Module:
    """The dense model with its weights shrunk, which a training can mend."""
    student = copy.deepcopy(w.model)
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):
            p.mul_(0.8 + 0.05 * (i % 3))
    return student


def thin(model: nn.Module, density: float) -> nn.Module:
    """Of each matrix the largest weights stay, such a share of them; in place."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                small = p.abs().flatten().argsort()[: p.numel() - round(density * p.numel())]
                p.masked_fill_(torch.zeros(p.numel(), dtype=torch.bool).index_fill(0, small, True).view(p.shape), 0.0)
    return model


def nonzeros(model: nn.Module) -> dict[str, int]:
    """How many weights of each matrix are not zero."""
    return {name: int((p != 0).sum()) for name, p in model.named_parameters() if p.dim() > 1}
