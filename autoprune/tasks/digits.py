"""Task `digits`: scikit-learn's real handwritten digits and a small residual CNN, trained once and cached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.errors import InputError
from autoprune.protocols import Batch, Direction
from autoprune.tasks._arrays import DIRECTIONS, Batches, Normalised, accuracies, cut, pick
from autoprune.tasks._cache import cache_folder, keep
from autoprune.tasks._cifar_resnet import CifarResNet
from autoprune.tasks._weights import load_weights
from autoprune.tracing.one_thread import one_thread
from autoprune.tracing.sound_gradients import SoundGradients

N_TEST, EPOCHS, BATCH, PEAK_RATE, AUGMENTED = 360, 60, 32, 0.05, 0.8
RECIPE = 2
"""Raise it whenever the model or its training changes: the cached weights carry it in their name."""


class Digits:
    """1797 pictures of 8 x 8 pixels, 10 classes; a residual CNN of 14 layers with projection shortcuts."""

    def __init__(self, n_calibration: int = 640, n_validation: int = 300, seed: int = 0) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        images = data.images.astype(np.uint8)[..., None]
        labels = torch.from_numpy(data.target.astype(np.int64))
        order = np.random.default_rng(1234).permutation(len(images))  # the test split does not move with the seed
        test, rest = order[:N_TEST], order[N_TEST:]
        parts = cut(len(rest), n_calibration, n_validation, seed)
        rows = {**{name: rest[part] for name, part in parts.items()}, "test": test}
        ready = Normalised(torch.tensor([0.3]), torch.tensor([0.38]), scale=16.0)
        self._splits = {name: Batches(images, r, labels[r], ready) for name, r in rows.items()}
        self._key = f"{n_calibration}-{n_validation}-{seed}"

    @property
    def directions(self) -> Mapping[str, Direction]:
        return DIRECTIONS

    def build(self) -> nn.Module:
        path = cache_folder() / f"digits-{RECIPE}-{self._key}.safetensors"
        if not path.exists():
            keep(_train(self._splits["train"]), path)
        with torch.random.fork_rng(devices=[]):  # first weights are drawn, then overwritten: leave no trace of it
            model = _model()
        try:
            load_weights(model, path)
        except InputError:  # a cache is no input: what does not load is made anew
            keep(_train(self._splits["train"]), path)
            load_weights(model, path)
        return model.eval()

    def example_inputs(self) -> tuple[Tensor, ...]:
        inputs, _ = next(iter(self._splits["calibration"]))
        return (inputs[:2].clone(),)

    def split(self, name: str) -> Iterable[Batch]:
        return pick(self._splits, name)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(batch[0])
        return logits

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), batch[1])

    def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        return accuracies(model, batches)


def _model() -> CifarResNet:
    return CifarResNet(14, channels=1, planes=(8, 16, 32), shortcut="projection")


def _train(batches: Batches) -> CifarResNet:
    """SGD with a one-cycle rate on shifted and turned pictures; the same weights on every run of a machine."""
    pairs = list(batches)
    inputs, targets = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    generator = torch.Generator().manual_seed(0)
    with _reproducible():
        model = _model().train()
        optimizer = torch.optim.SGD(model.parameters(), PEAK_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
        steps = EPOCHS * (len(inputs) // BATCH)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = PEAK_RATE * min(5 * step / steps, (1 - step / steps) / 0.8) + 1e-5
            rows = torch.randint(len(inputs), (BATCH,), generator=generator)
            pictures = inputs[rows]
            if step < AUGMENTED * steps:  # then clean ones: turned pictures are blurred, and batch norm would keep that
                pictures = _augment(pictures, generator)
            with SoundGradients():
                loss = F.cross_entropy(model(pictures), targets[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    return model


def _augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 15 degrees, stretch by up to 10 %, shift by up to a pixel; each picture differently."""
    n = len(x)
    turn, stretch_x, stretch_y, shift_x, shift_y = torch.rand(5, n, generator=generator) * 2 - 1
    angle = turn * 0.26
    rows_x = torch.stack([angle.cos() * (1 + 0.1 * stretch_x), -angle.sin(), shift_x / 4], dim=1)
    rows_y = torch.stack([angle.sin(), angle.cos() * (1 + 0.1 * stretch_y), shift_y / 4], dim=1)
    grid = F.affine_grid(torch.stack([rows_x, rows_y], dim=1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False).contiguous(
        memory_format=torch.channels_last
    )


@contextmanager
def _reproducible() -> Iterator[None]:
    """One thread and a seeded global generator (for the first weights) inside; both come back as they were."""
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(0)
        yield
