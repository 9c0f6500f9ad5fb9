"""The CIFAR ResNet of He et al. 2016 (arXiv 1512.03385, section 4.2): three stages, 20, 32, 44 or 56 layers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.errors import InputError

Shortcut = Literal["pad", "projection"]


class CifarResNet(nn.Module):
    """[N, channels, H, W] -> logits [N, classes]; `shortcut` is how the planes grow between stages."""

    def __init__(
        self,
        depth: int,
        classes: int = 10,
        channels: int = 3,
        planes: tuple[int, int, int] = (16, 32, 64),
        shortcut: Shortcut = "pad",
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise InputError(f"the depth of a CIFAR ResNet is 6n + 2 (8, 14, 20, 32, 44, 56), not {depth}")
        n_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, planes[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.layer1 = _stage(planes[0], planes[0], n_blocks, shortcut)
        self.layer2 = _stage(planes[0], planes[1], n_blocks, shortcut)
        self.layer3 = _stage(planes[1], planes[2], n_blocks, shortcut)
        self.linear = nn.Linear(planes[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def resnet20() -> CifarResNet:
    """ResNet-20 with padded identity shortcuts, 10 classes; weights not set."""
    return CifarResNet(20)


def resnet32() -> CifarResNet:
    """ResNet-32 with padded identity shortcuts, 10 classes; weights not set."""
    return CifarResNet(32)


def resnet44() -> CifarResNet:
    """ResNet-44 with padded identity shortcuts, 10 classes; weights not set."""
    return CifarResNet(44)


def resnet56() -> CifarResNet:
    """ResNet-56 with padded identity shortcuts, 10 classes; weights not set."""
    return CifarResNet(56)


class BasicBlock(nn.Module):
    """conv bn relu conv bn, plus the shortcut, relu."""

    def __init__(self, planes_in: int, planes: int, shortcut: Shortcut) -> None:
        super().__init__()
        stride = 1 if planes_in == planes else 2
        self.conv1 = nn.Conv2d(planes_in, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module = nn.Identity()
        if planes_in != planes and shortcut == "pad":
            self.shortcut = PadShortcut((planes - planes_in) // 2)
        elif planes_in != planes:
            convolution = nn.Conv2d(planes_in, planes, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class PadShortcut(nn.Module):
    """Every second row and column, and `planes` zero planes before and after: a shortcut without parameters."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.planes = planes

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.planes, self.planes))


def _stage(planes_in: int, planes: int, n_blocks: int, shortcut: Shortcut) -> nn.Sequential:
    """`n_blocks` blocks; the first one grows the planes and halves the picture where they differ."""
    return nn.Sequential(*(BasicBlock(planes_in if i == 0 else planes, planes, shortcut) for i in range(n_blocks)))
