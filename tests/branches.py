"""A small network of residual branches, each of which does something of its own with its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """What it adds to its input; `mix` does something else with that input first."""

    def __init__(self, mix: str = "") -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.mix = mix
        if mix == "alias":
            self.convs = nn.ModuleList([self.a, self.b])

    def forward(self, x: Tensor) -> Tensor:
        if self.mix == "inplace":
            y = self.norm(self.b(self.a(x).sub_(0.5).relu_()))
            y += x
            return y.relu_()  # type: ignore[no-any-return]
        y = self.norm(self.b(self.a(x).relu()))
        if self.mix == "gate":
            y = y * x.sigmoid()
        if self.mix == "shift":
            y = y + 1.0
        if self.mix == "product":
            return x * y  # type: ignore[no-any-return]
        return (y if self.mix == "twice" else x) + y  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self, *mixes: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(Bottleneck(mix) for mix in mixes))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return logits
