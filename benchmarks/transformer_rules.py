"""What others prune transformers by, as criteria and strategies of a job: Minitron, FLAP, ShortGPT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.allocation.budget import SLACK
from autoprune.database.build import consumers_by_group
from autoprune.database.consumers import Consumer
from autoprune.errors import InputError
from autoprune.policy import Policy
from autoprune.protocols import Problem, Task
from autoprune.strategies._thresholds import above_threshold
from autoprune.structure import Group, Structure


class ActivationNorm:
    """Minitron (Muralidharan et al. 2024): the norm of what an atom hands to its reader, over the calibration data."""

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        found = consumers_by_group(model, groups, task, task.split("calibration"))
        return {group.name: self.from_consumers(group, consumers) for group, consumers in found}

    def from_consumers(self, group: Group, consumers: Sequence[Consumer]) -> Tensor:
        """Root of the summed mean squares of an atom's inputs."""
        return torch.stack([_by_atom(_squares(c), c, group.width) for c in consumers]).sum(0).sqrt()


class Fluctuation:
    """FLAP (An et al. 2024): the variance of an atom's inputs, each times the squared norm of the weights it meets."""

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        found = consumers_by_group(model, groups, task, task.split("calibration"))
        return {group.name: self.from_consumers(group, consumers) for group, consumers in found}

    def from_consumers(self, group: Group, consumers: Sequence[Consumer]) -> Tensor:
        """Summed over the inputs of an atom."""
        found = []
        for c in consumers:
            variance = (_squares(c) - c.mean.square()).clamp_min(0)
            found.append(_by_atom(variance * c.matrix.square().sum(1), c, group.width))
        return torch.stack(found).sum(0)


def flap(problem: Problem, target: float) -> Policy:
    """FLAP's allocation: scores standardised in each group, one threshold over all atoms of all groups."""
    spread = []
    for group in problem.structure.groups:
        values = np.sort(np.asarray(problem.scores[group.name], dtype=np.float64))
        deviation = float(values.std()) or 1.0
        spread.append((values - values.mean()) / deviation)
    return above_threshold(problem, target, spread)


def shortgpt(structure: Structure, influence: Mapping[str, float], macs: Any, target: float) -> Policy:
    """ShortGPT (Men et al. 2024): whole layers leave, those of the least influence first, until the budget holds.

    Raises:
        InputError: not even without any layer.
    """
    widths = Policy.dense(structure).as_dict()
    for layer in sorted(influence, key=lambda name: influence[name]):
        if float(np.asarray(macs(Policy.of(widths).array(structure)))) <= target + SLACK:
            break
        for group in structure.groups:
            if group.kind == "block" and group.name.startswith(f"{layer}."):
                widths[group.name] = 0
    policy = Policy.of(widths)
    if float(np.asarray(macs(policy.array(structure)))) > target + SLACK:
        raise InputError(f"macs={target:g} is out of reach by whole layers")
    return policy


def block_influence(model: nn.Module, task: Task, layers: Sequence[str], batches: int = 4) -> dict[str, float]:
    """1 - the mean cosine between what goes into a layer and what comes out, over real tokens (ShortGPT's BI)."""
    total, count = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0)
    real: list[Tensor | None] = [None]

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            y = out[0] if isinstance(out, tuple) else out
            alike = torch.cosine_similarity(x.flatten(0, 1).double(), y.flatten(0, 1).double(), -1)
            alike = alike if real[0] is None else alike[real[0]]
            total[name] += float(alike.sum())
            count[name] += len(alike)

        return hook

    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_hook(watch(name), with_kwargs=True) for name in layers]
    try:
        with torch.no_grad():
            for _, batch in zip(range(batches), task.split("calibration"), strict=False):
                mask = batch[0].get("attention_mask")
                real[0] = None if mask is None else mask.bool().flatten()
                task.outputs(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: 1.0 - total[name] / max(count[name], 1) for name in layers}


def _squares(c: Consumer) -> Tensor:
    """Mean squares of a consumer's inputs [conv groups, atoms * block]."""
    return c.second.diagonal(dim1=1, dim2=2)


def _by_atom(values: Tensor, c: Consumer, width: int) -> Tensor:
    """Values [conv groups, atoms * block] summed to atoms [width], float64."""
    summed = values.sum(0).view(len(c.atoms), c.block).sum(1).double().cpu()
    return torch.zeros(width, dtype=torch.float64).index_add_(0, c.atoms, summed)
