"""Networks of one family, deeper and wider: as data without a model, as small ResNets, as small BERTs, as a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.allocation.sibling import Network
from autoprune.application.transfer import Sibling, sibling_of
from autoprune.front import Point
from autoprune.policy import Policy
from autoprune.structure import Group, Op, Slice, Stand, Structure, TensorSpec
from autoprune.tasks._cifar_resnet import CifarResNet
from autoprune.tasks.digits import Digits
from tests.points import front_over
from tests.transformer_models import MODELS

PLANES = (4, 8, 16)


def staged(blocks: Sequence[int], planes: Sequence[int], droppable: bool = False, before: str = "") -> Structure:
    """Stages of residual blocks: an inner group `layerS.B.conv1` each, and the block itself where it is droppable."""
    groups: list[Group] = []
    ops: list[Op] = []
    for stage, (n, wide) in enumerate(zip(blocks, planes, strict=True), start=1):
        area = 4096 // wide
        for block in range(n):
            name = f"{before}layer{stage}.{block}"
            specs = [TensorSpec(f"{name}.conv{i}.weight", (wide, wide, 3, 3), 4) for i in (1, 2)]
            ops += [Op(f"{name}.{s.name}", "Conv2d", len(ops), area, s.name, tensors=(s,)) for s in specs]
            inner = (Slice(specs[0].name, 0, "produce"), Slice(specs[1].name, 1, "consume"))
            if droppable:
                whole = tuple(Slice(s.name, 0, "produce", 0, wide, wide) for s in specs)
                groups.append(Group(name, "block", 1, whole, (0, 1), (), (Stand(name, "zero"),)))
            groups.append(Group(f"{name}.conv1", "channel", wide, inner, tuple(range(1, wide + 1))))
    head = TensorSpec(f"{before}linear.weight", (10, planes[-1]), 4)
    return Structure(tuple(groups), (*ops, Op("linear", "Linear", len(ops), 1, head.name, tensors=(head,))))


def network(structure: Structure) -> Network:
    """The same as what tells its layers apart."""
    return Network(structure.groups, {spec.name: spec.shape for op in structure.ops for spec in op.tensors})


def random_policy(structure: Structure, seed: int, absent: float = 0.3) -> Policy:
    """Any widths of the grids; each block is absent with the chance `absent`."""
    rng = np.random.default_rng(seed)
    widths = [int(rng.random() >= absent) if g.kind == "block" else int(rng.choice(g.grid)) for g in structure]
    return Policy.from_array(structure, widths)


def resnet(blocks: int, planes: tuple[int, int, int] = PLANES) -> nn.Module:
    """A ResNet of so many blocks a stage, untrained, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(blocks)
        return CifarResNet(6 * blocks + 2, planes=planes).eval()


def stranger() -> nn.Module:
    """A network that takes the same pictures, and whose layers are called otherwise."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 3)).eval()


def wide_resnet() -> nn.Module:
    """One of four times the planes, whose widths a container of tiles can hold."""
    return resnet(2, (32, 64, 64))


def bert(layers: int, model: str = "BertModel") -> nn.Module:
    """A BERT of so many layers, untrained."""
    small = MODELS["bert"]
    return replace(small, model=model, settings={**small.settings, "num_hidden_layers": layers}).build()


def pictures() -> tuple[Tensor, ...]:
    """What the ResNets take."""
    return (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)


@cache
def known(blocks: int, planes: tuple[int, int, int] = PLANES) -> Sibling:
    """The ResNet, analysed once."""
    base = front_over(resnet(1), pictures(), structure=staged((1,), (4,), droppable=True)).base  # for its kinds
    return sibling_of(base, resnet(blocks, planes), pictures(), f"resnet{blocks}")


def point_on(blocks: int, planes: tuple[int, int, int] = PLANES, seed: int = 2) -> Point:
    """A point of random widths over it."""
    return front_over(resnet(blocks, planes), pictures(), seed, known(blocks, planes).structure)[0]


class DeepDigits(Digits):
    """The digits with a network of 20 layers in place of 14, untrained: the sibling of the other one."""

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return CifarResNet(20, channels=1, planes=(8, 16, 32), shortcut="projection").eval()
