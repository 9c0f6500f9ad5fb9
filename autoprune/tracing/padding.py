"""Which tokens of a batch of text are real: what stands in a padded place is nobody's output, and teaches nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MASK = "attention_mask"


def real_tokens(batch: Any) -> Tensor | None:
    """Bool [N, T] from the `attention_mask` among the inputs of a batch; None where there is none or all is real."""
    inputs = batch[0] if isinstance(batch, tuple | list) and len(batch) == 2 else batch
    mask = inputs.get(MASK) if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.bool()


def without_padding(outputs: Tensor, batch: Any) -> Tensor:
    """Outputs [N, T, ...] whose padded places hold those of real tokens again, one after another.

    A mean over the places of a sample is thus one over its real tokens, but for the last round. Others, [N, classes]
    and the like, stay as they are.
    """
    real = real_tokens(batch)
    if real is None or outputs.dim() < 3 or outputs.shape[:2] != real.shape:
        return outputs
    real = real.to(outputs.device)
    first = (~real).to(torch.uint8).argsort(dim=1, stable=True)  # the real ones, in their order
    turn = torch.arange(real.shape[1], device=real.device) % real.sum(1, keepdim=True).clamp_min(1)
    index = first.gather(1, turn)
    return outputs[torch.arange(len(outputs), device=real.device)[:, None], index]


def real_rows(shape: torch.Size, positions: Tensor, real: Tensor | None) -> Tensor | None:
    """Of the rows of an input [..., features] at flat `positions` a sample, which are real: their indices, int64.

    `shape` is the input's; None where all are, or where its places are not the tokens. An input [N * T, features] has
    one position a row.
    """
    if real is None or shape[:-1].numel() != real.numel():
        return None
    flags = real.reshape(shape[:-1])
    if flags.dim() > 1:
        flags = flags.flatten(1)[:, positions.to(flags.device)]
    return flags.flatten().nonzero()[:, 0]
