"""How a pruned model lies on disk: weights of 8 bits as integers and scales, masked ones as bits and values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from autoprune.application.masks import split, write_split
from autoprune.front import Point
from autoprune.tracing.rounding import along, narrow_weights, nearest

SCALES = ".scales"
"""Behind the name of a weight of integers, that of its scales, which broadcast over it."""


def write_weights(model: nn.Module, point: Point, path: Path) -> None:
    """All tensors of a pruned model as safetensors, masks of its zeros beside them (`application.masks`).

    A weight that was trained since it was rounded is no longer what 8 bits hold: it is written in float32, and that is
    said.
    """
    tensors = {k: v.detach().cpu() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    trained = list[str]()
    for weight in narrow_weights(model, point.base.groups, point.policy.as_dict()):
        found = nearest(tensors[weight.name], weight.dim)
        if not torch.equal(found.weight, tensors[weight.name]):
            trained.append(weight.name)
            continue
        scales = along(found.scales, found.integers, weight.dim)
        tensors |= {weight.name: found.integers, weight.name + SCALES: scales}
    if trained:
        more = f" and {len(trained) - 1} more" if len(trained) > 1 else ""
        warnings.warn(
            f"{trained[0]}{more}: the policy stores it in 8 bits, and it was trained since; it is saved in float32",
            stacklevel=4,
        )
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    write_split(split(tensors, names, point), point, path)


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file of `write_weights` as floating numbers."""
    found = dict(tensors)
    scales = {name: found.pop(name + SCALES) for name in tensors if name + SCALES in tensors}
    return found | {name: found[name].float() * scale for name, scale in scales.items()}
