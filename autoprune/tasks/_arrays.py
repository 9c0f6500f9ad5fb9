"""What the tasks over in-memory arrays share: disjoint seeded splits, batches of pictures, accuracies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.errors import InputError, did_you_mean
from autoprune.protocols import SPLITS, Direction
from autoprune.tracing.eval_mode import evaluating

T = TypeVar("T")
Pair = tuple[Tensor, Tensor]
MOST_CUT = 1024
"""Calibration and validation samples that are cut off by default, at most; an image of 224 pixels is 0.6 MB decoded."""


@dataclass(frozen=True)
class Normalised:
    """Bytes [n, H, W, C] become inputs [n, C, H, W]: (x / scale - mean) / std. Inputs that are none stay."""

    mean: Tensor
    std: Tensor
    scale: float = 255.0

    def __call__(self, pair: Pair) -> Pair:
        pictures, labels = pair
        if pictures.dtype != torch.uint8:
            return pair
        scaled = pictures.permute(0, 3, 1, 2).float() / self.scale
        return (scaled - self.mean[:, None, None]) / self.std[:, None, None], labels

    def back(self, pair: Pair) -> Pair:
        """The bytes that inputs come from, where they come from bytes to the last bit; else the inputs."""
        inputs, labels = pair
        pictures = (inputs * self.std[:, None, None] + self.mean[:, None, None]) * self.scale
        found = pictures.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous(), labels
        return found if torch.equal(self(found)[0], inputs) else pair


@dataclass(frozen=True)
class Batches:
    """Pictures as (inputs float32, targets int64), the same at every pass; made batch by batch.

    They are the `rows` of `images`, bytes [N, H, W, C], which may be mapped from a file.
    """

    images: np.ndarray
    rows: np.ndarray
    labels: Tensor
    ready: Normalised
    size: int = 256

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __iter__(self) -> Iterator[Pair]:
        for pair in self.stored():
            inputs, labels = self.ready(pair)
            yield inputs.contiguous(), labels

    @property
    def samples(self) -> int:
        return len(self.rows)

    def stored(self) -> Iterator[Pair]:
        """The same as bytes, of which `ready` makes inputs."""
        for start in range(0, len(self.rows), self.size):
            pictures = torch.from_numpy(np.array(self.images[self.rows[start : start + self.size]]))
            yield pictures, self.labels[start : start + self.size]


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


def shares(n: int, n_calibration: int | None, n_validation: int | None) -> tuple[int, int]:
    """Calibration and validation samples of `n`: as asked, else a share of them and no more than `MOST_CUT`."""
    asked = ((n_calibration, 0.30), (n_validation, 0.15))
    calibration, validation = (min(round(s * n), MOST_CUT) if given is None else given for given, s in asked)
    return calibration, validation


def pick(splits: Mapping[str, T], name: str) -> T:
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
