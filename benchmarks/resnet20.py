"""What the search benchmark measures on: ResNet-20 and the JPEG copies of CIFAR-10, scored on 10 000 test images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.database.batches import chunks, gather
from autoprune.database.batches import prepare as prepare_batch
from autoprune.evaluation import Ask, Evaluation
from autoprune.evaluator.precision import computing
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.losses.kl import kl
from autoprune.protocols import Batch, Task
from autoprune.tasks.images import Images

CALIBRATION = 3072
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


class OnTest:
    """Scores asks on the test images: the model is repaired (and tuned) as ever, then seen once in its precision."""

    def __init__(self, evaluator: TieredEvaluator) -> None:
        self._evaluator = evaluator
        parts = [prepare_batch(b, evaluator.device, evaluator.parts.layout) for b in evaluator.task.split("test")]
        self._batches = [part for whole in gather(parts, 10_000) for part in chunks(whole, 250)]
        self._dense = [self._outputs(evaluator.dense, b) for b in self._batches]

    def __call__(self, ask: Ask) -> Evaluation:
        evaluator, started = self._evaluator, time.perf_counter()
        model = evaluator.repaired(ask)
        losses: list[float] = []
        right = 0
        for batch, dense in zip(self._batches, self._dense, strict=True):
            outputs = self._outputs(model, batch)
            losses += kl(outputs, dense, classes=-1).tolist()
            right += int((outputs.argmax(-1) == batch[1]).sum())
        costs = {name: float(cost(ask.policy.array(evaluator.structure))) for name, cost in evaluator.costs.items()}
        metrics, seconds = {"accuracy": right / len(losses)}, time.perf_counter() - started
        return Evaluation(ask, float(np.mean(losses)), costs, metrics, 0.0, seconds, None, tuple(losses))

    def _outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad(), computing(model, self._evaluator.precision):
            return self._evaluator.task.outputs(model, batch)


def on_test(factory: Callable[[], TieredEvaluator]) -> OnTest:
    """What a worker builds once."""
    return OnTest(factory())


class Peeking(Images):
    """Searched with test images: the calibration samples but for the statistics are the first of them."""

    def split(self, name: str) -> Iterable[Batch]:
        if name != "calibration":
            return super().split(name)
        seen, test = gather(super().split(name), CALIBRATION // 4), gather(super().split("test"), CALIBRATION * 3 // 4)
        return *seen, *test


def images() -> Task:
    """ResNet-20 with the JPEG weights and the JPEG copies of CIFAR-10."""
    return _task(Images)


def peeking() -> Task:
    """The same, for a search that may see what nobody may."""
    return _task(Peeking)


def _task(kind: type[Images]) -> Task:
    arrays: dict[str, Any] = {
        f"{s}_{k}": DATA / f"cifar10_jpeg_{s}_{k}.npy" for s in ("train", "test") for k in ("images", "labels")
    }
    return kind(
        model="autoprune.tasks:resnet20",
        weights=DATA / "resnet20_cifar10_jpeg.safetensors",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        n_calibration=CALIBRATION,
        n_validation=1024,
        **arrays,
    )
