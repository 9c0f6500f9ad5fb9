"""Small models of every family that must analyse, prune and stay equal to a masked reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """How to build a model (the same one at every call) and its inputs; which groups must be alive, at which width."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    alive: dict[str, int]

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make()
            for module in model.modules():  # statistics of a trained model, not the constants of a fresh one
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias, 0.0, 0.1)
                    nn.init.normal_(module.running_mean, 0.0, 0.1)
                    nn.init.uniform_(module.running_var, 0.5, 1.5)
        return model

    def inputs(self, batch: int = 2) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        return (torch.randn(batch, *self.shape, generator=generator),)


def conv_bn(inner: int, outer: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outer))


class PlainCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 5, stride=2, padding=2, dilation=1)
        self.act2 = nn.PReLU(12)
        self.fc1 = nn.Linear(12 * 4 * 4, 20)
        self.fc2 = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.act2(self.conv2(x))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Residual(nn.Module):
    """Two blocks; the second grows from 8 to 16 channels by a padded or a projection shortcut."""

    def __init__(self, projection: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a1, self.a2 = conv_bn(8, 8), conv_bn(8, 8)
        self.b1, self.b2 = conv_bn(8, 16, stride=2), conv_bn(16, 16)
        self.down = conv_bn(8, 16, 1, 2) if projection else None
        self.linear = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.a2(F.relu(self.a1(x))))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)) if self.down is None else self.down(x)
        x = F.relu(short + self.b2(F.relu(self.b1(x))))
        return self.linear(x.mean((2, 3)))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(14), nn.Conv2d(14, 6, 3, padding=1, bias=False)
        self.bn3, self.transition = nn.BatchNorm2d(20), nn.Conv2d(20, 10, 1, bias=False)
        self.bn4, self.linear = nn.BatchNorm2d(10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.bn1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.bn2(x)))], 1)
        x = F.avg_pool2d(self.transition(F.relu(self.bn3(x))), 2)
        return self.linear(F.adaptive_avg_pool2d(F.relu(self.bn4(x)), 1).flatten(1))


class SqueezeExcite(nn.Module):
    """As convs (MobileNetV3, EfficientNet) or as linears with views (SENet)."""

    def __init__(self, width: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.reduce: nn.Module = nn.Linear(width, 4) if linear else nn.Conv2d(width, 4, 1)
        self.expand: nn.Module = nn.Linear(4, width) if linear else nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = F.adaptive_avg_pool2d(x, 1)
        if not self.linear:
            return x * torch.sigmoid(self.expand(F.relu(self.reduce(s))))
        batch, channels = x.shape[:2]
        s = torch.sigmoid(self.expand(F.relu(self.reduce(s.view(batch, channels)))))
        return x * s.view(batch, channels, 1, 1).expand_as(x)


class InvertedResidual(nn.Module):
    def __init__(self, inner: int, hidden: int, outer: int, linear_se: bool) -> None:
        super().__init__()
        self.expand, self.depthwise = conv_bn(inner, hidden, 1), conv_bn(hidden, hidden, groups=hidden)
        self.se, self.project = SqueezeExcite(hidden, linear_se), conv_bn(hidden, outer, 1)
        self.adds = inner == outer

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.se(F.hardswish(self.depthwise(F.relu6(self.expand(x))))))
        return x + y if self.adds else y


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.block1 = InvertedResidual(8, 16, 8, False)
        self.block2 = InvertedResidual(8, 24, 12, True)
        self.head = nn.Conv2d(12, 20, 1)
        self.linear = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(F.relu6(self.stem(x))))
        return self.linear(F.relu(self.head(x)).mean((2, 3)))


class ResNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.conv1, self.conv2, self.conv3 = conv_bn(16, 24, 1), conv_bn(24, 24, groups=4), conv_bn(24, 16, 1)
        self.grow, self.linear = conv_bn(16, 32, groups=2), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))
        return self.linear(F.relu(self.grow(x)).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = conv_bn(3, 8), conv_bn(8, 12), conv_bn(12, 16)
        self.up2, self.merge2 = nn.ConvTranspose2d(16, 12, 2, stride=2), conv_bn(24, 12)
        self.up1, self.merge1 = nn.ConvTranspose2d(12, 8, 2, stride=2), conv_bn(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(F.max_pool2d(a, 2)))
        c = F.relu(self.middle(F.max_pool2d(b, 2)))
        b = F.relu(self.merge2(torch.cat([b, self.up2(c)], 1)))
        a = F.relu(self.merge1(torch.cat([self.up1(b), a], 1)))
        return self.head(a)


class SharedConv(nn.Module):
    """One conv used three times in a row, another on two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, 10, 3, padding=1)
        self.left, self.right = nn.Conv2d(10, 8, 3, padding=1), nn.Conv2d(10, 8, 3, padding=1)
        self.both, self.linear = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(3):
            x = F.relu(self.shared(x))
        y = F.relu(self.both(F.relu(self.left(x)))) + F.relu(self.both(F.relu(self.right(x))))
        return self.linear(y.mean((2, 3)))


class Split(nn.Module):
    """Channels are cut at numbers that the model holds: in parts that are alike (Res2Net), and in others (MixNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.splits = 5, [6, 4]
        self.stem = conv_bn(3, 15)
        self.left, self.right = conv_bn(5, 5), conv_bn(5, 5)
        self.up = conv_bn(15, 10)
        self.small, self.large = (nn.Conv2d(n, n, k, padding=k // 2, groups=n) for n, k in ((6, 3), (4, 5)))
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three = torch.split(F.relu(self.stem(x)), self.width, 1)
        one = F.relu(self.left(one))
        x = torch.cat([one, F.relu(self.right(one + two)), three], 1)
        few, many = torch.split(F.relu(self.up(x)), self.splits, 1)
        return self.head(F.relu(torch.cat([self.small(few), self.large(many)], 1)).mean((2, 3)))


FAMILIES: dict[str, Family] = {
    "plain": Family(PlainCnn, (3, 8, 8), {"conv1": 8, "conv2": 12, "fc1": 20}),
    "padded": Family(lambda: Residual(False), (3, 8, 8), {"conv1": 8, "a1.0": 8, "b1.0": 16}),
    "projection": Family(lambda: Residual(True), (3, 8, 8), {"conv1": 8, "a1.0": 8, "b1.0": 16, "down.0": 16}),
    "densenet": Family(DenseNet, (3, 8, 8), {"stem": 8, "conv1": 6, "conv2": 6, "transition": 10}),
    "mobilenet": Family(
        MobileNet,
        (3, 8, 8),
        {
            "stem.0": 8,
            "block1": 1,
            "block1.expand.0": 16,
            "block1.se.reduce": 4,
            "block2.expand.0": 24,
            "block2.se.reduce": 4,
            "block2.project.0": 12,
            "head": 20,
        },
    ),
    "resnext": Family(ResNeXt, (3, 8, 8), {"stem.0": 8, "conv1.0": 6, "conv2.0": 6, "grow.0": 16}),
    "unet": Family(
        UNet,
        (3, 16, 16),
        {"down1.0": 8, "down2.0": 12, "middle.0": 16, "up2": 12, "merge2.0": 12, "up1": 8, "merge1.0": 8},
    ),
    "shared": Family(SharedConv, (3, 8, 8), {"stem": 10, "left": 8, "both": 6}),
    "split": Family(Split, (3, 8, 8), {"stem.0": 5, "right.0": 5, "up.0": 6, "up.0#2": 4}),
}
