"""Loss and metrics of a model as it stands, on the evaluator's samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from autoprune.database.batches import size
from autoprune.errors import InputError, did_you_mean
from autoprune.evaluation import Split
from autoprune.evaluator.fidelity import Fidelity, Tally
from autoprune.evaluator.precision import computing
from autoprune.evaluator.samples import Samples
from autoprune.evaluator.settings import Settings
from autoprune.protocols import Batch, Task
from autoprune.tracing.outputs import faithful

Way = Callable[[], AbstractContextManager[object]]
"""How a batch runs."""


@dataclass(frozen=True)
class Score:
    """What an evaluation found, and the samples that went forward for it."""

    loss: float
    samples: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    single: tuple[float, ...] = ()


@dataclass(frozen=True)
class Judge:
    """Scores models against the dense one's outputs, by `measure`, and by the task's metrics."""

    task: Task
    settings: Settings
    samples: Samples
    measure: Fidelity

    def standing(self, model: nn.Module, split: Split, way: Way) -> Score:
        """The model on a whole split, with metrics."""
        batches = self.samples.batches(split)
        count, metrics = float(batches.samples), self.metrics(model, batches, split, way)
        if self.settings.metric is not None:
            return Score(self.signed(metrics), count, metrics)
        loss, single = self.losses(model, batches, split, way)
        return Score(loss, 2 * count, metrics, single)

    def held_back(self, model: nn.Module, way: Way) -> float:
        """What the search minimises, on the held-back samples; inf where that is no number."""
        batches = self.samples.batches("heldback")
        if self.settings.metric is not None:
            loss = self.signed(self.metrics(model, batches, "heldback", way))
        else:
            loss = self.losses(model, batches, "heldback", way)[0]
        return loss if math.isfinite(loss) else math.inf

    def losses(
        self, model: nn.Module, batches: Sequence[Batch], split: Split, way: Way
    ) -> tuple[float, tuple[float, ...]]:
        """The mean loss and, to 6 digits, that of each sample; none of these where outputs are not by sample."""
        tally = Tally()
        for i, batch in enumerate(batches):
            reference = self.samples.reference(split, i, batch)
            with torch.no_grad():
                with computing(model, self.samples.precision_on(split)), way():
                    outputs = faithful(self.task, model, batch)
                tally.add(self.measure(outputs, reference.outputs), size(batch))
        return tally.loss, tally.by_sample

    def metrics(self, model: nn.Module, batches: Sequence[Batch], split: Split, way: Way) -> Mapping[str, float]:
        """The task's metrics; on validation the model runs as it is."""
        mode = nullcontext() if split == "validation" else way()
        with torch.no_grad(), computing(model, self.samples.precision_on(split)), mode:
            return {k: float(v) for k, v in self.task.metrics(model, batches).items()}

    def signed(self, metrics: Mapping[str, float]) -> float:
        """The loss where the search minimises a metric, or its negative."""
        name = self.settings.objective
        if name not in metrics:
            raise InputError(f"objectives.loss.metric: the task has no metric {name!r}; {did_you_mean(name, metrics)}")
        return -metrics[name] if self.settings.direction == "maximize" else metrics[name]
