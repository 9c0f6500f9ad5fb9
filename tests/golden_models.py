"""Models whose weights are the same bits on every machine: what the policy files of version 0.1.0 were found on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mixed(nn.Module):
    """Concatenation, a depthwise convolution and a flattening: slices with offsets, carried weights, repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.left = nn.Conv2d(12, 10, 3, padding=1)
        self.right = nn.Conv2d(12, 14, 1)
        self.norm = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.point = nn.Conv2d(24, 16, 1)
        self.hidden = nn.Linear(16 * 16, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(torch.cat([self.left(x), self.right(x)], dim=1)))
        x = F.relu(self.point(F.relu(self.depthwise(x))))
        logits: Tensor = self.head(F.relu(self.hidden(F.max_pool2d(x, 2).flatten(1))))
        return logits


def exact_weights(model: nn.Module) -> nn.Module:
    """Fill every tensor with seeded multiples of 2^-10, of a fan-in's size; variances and scales are about one."""
    rng = np.random.default_rng(2026)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            if not tensor.is_floating_point():
                continue
            drawn = torch.from_numpy(rng.integers(-512, 513, size=tuple(tensor.shape)).astype(np.float32)) / 1024
            one_dimensional = tensor.dim() == 1
            if one_dimensional and not name.endswith(("bias", "mean")):
                drawn = 1.0 + drawn / 2
            elif tensor.dim() > 1:
                drawn = drawn * 2.0 ** -round(np.log2(np.sqrt(tensor[0].numel()) / 4))
            tensor.copy_(drawn)
    return model.eval()


def mixed() -> nn.Module:
    """The small one."""
    return exact_weights(Mixed())


def resnet20_exact() -> nn.Module:
    """ResNet-20 for CIFAR-10."""
    from autoprune.tasks import resnet20  # `mixed` stands without autoprune

    return exact_weights(resnet20())


class RandomPictures:
    """Random pictures, labelled by the model itself."""

    def __init__(self, model: str, samples: int = 32) -> None:
        self._build, shape = {"mixed": (mixed, (1, 8, 8)), "resnet20": (resnet20_exact, (3, 32, 32))}[model]
        rng = np.random.default_rng(7)
        draw = {name: rng.standard_normal((samples, *shape)) for name in ("calibration", "validation", "test", "train")}
        self._inputs = {name: torch.from_numpy(x.astype(np.float32)) for name, x in draw.items()}

    @property
    def directions(self) -> Mapping[str, str]:
        return {"accuracy": "maximize"}

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            return self._build()

    def example_inputs(self) -> tuple[Tensor, ...]:
        return (self._inputs["calibration"][:2].clone(),)

    def split(self, name: str) -> Iterable[tuple[Tensor, Tensor]]:
        x = self._inputs[name]
        with torch.no_grad():
            labels = self.build()(x).argmax(1)
        return list(zip(x.split(16), labels.split(16), strict=True))

    def outputs(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits: Tensor = model(batch[0])
        return logits

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), batch[1])

    def metrics(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Mapping[str, float]:
        with torch.no_grad():
            hits = torch.cat([(self.outputs(model, b).argmax(1) == b[1]).float() for b in batches])
        return {"accuracy": float(hits.mean())}
