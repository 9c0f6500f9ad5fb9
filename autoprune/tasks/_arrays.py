"""What the tasks over in-memory arrays share: disjoint seeded splits, batches of pictures, accuracies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from autoprune.errors import InputError, did_you_mean
from autoprune.protocols import SPLITS, Direction
from autoprune.tracing.eval_mode import evaluating

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Batches:
    """Pictures as (inputs float32, targets int64), the same at every pass; made batch by batch."""

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor
    scale: float
    size: int = 256

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[Pair]:
        for start in range(0, len(self.images), self.size):
            pictures = self.images[start : start + self.size].permute(0, 3, 1, 2).float() / self.scale
            inputs = (pictures - self.mean[:, None, None]) / self.std[:, None, None]
            yield inputs.contiguous(), self.labels[start : start + self.size]


def cut(n: int, n_calibration: int | None, n_validation: int | None, seed: int) -> Mapping[str, np.ndarray]:
    """Disjoint indices of `n` training samples; by default 30 % calibrate, 15 % validate, the rest trains.

    Raises:
        InputError: the parts do not leave a sample to train on.
    """
    calibration = round(0.30 * n) if n_calibration is None else n_calibration
    validation = round(0.15 * n) if n_validation is None else n_validation
    if min(calibration, validation) < 1 or calibration + validation >= n:
        raise InputError(
            f"n_calibration={calibration} and n_validation={validation} must be positive and leave some of the "
            f"{n} training samples for fine-tuning"
        )
    order = np.random.default_rng(seed).permutation(n)
    borders = np.cumsum([calibration, validation])
    parts = np.split(order, borders)
    return dict(zip(("calibration", "validation", "train"), parts, strict=True))


def pick(splits: Mapping[str, Batches], name: str) -> Batches:
    """The split called `name`."""
    if name not in splits:
        raise InputError(f"unknown split {name!r}; {did_you_mean(name, SPLITS)}")
    return splits[name]


DIRECTIONS: Mapping[str, Direction] = {"accuracy": "maximize", "worst_class_accuracy": "maximize"}
"""Which way the metrics of `accuracies` are better."""


def accuracies(model: nn.Module, batches: Iterable[Pair]) -> dict[str, float]:
    """Share of right answers over all batches, model in eval mode: of all, and of the class with the least of them.

    A class without a sample says nothing of itself and is left out.
    """
    right, seen = Counter[int](), Counter[int]()
    with evaluating(model):
        for inputs, targets in batches:
            hits = model(inputs).argmax(-1) == targets
            seen.update(targets.flatten().tolist())
            right.update(targets[hits].tolist())
    worst = min((right[label] / n for label, n in seen.items()), default=0.0)
    return {"accuracy": right.total() / max(seen.total(), 1), "worst_class_accuracy": worst}
