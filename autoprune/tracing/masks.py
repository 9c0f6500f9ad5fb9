"""Which numbers of a weight are not zero, as packed bits and under the hash that policy files know them by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.structure import Group


def packed(mask: Tensor) -> Tensor:
    """Bits of a bool tensor in the order of its numbers, eight a byte, the first one the highest: uint8 [bytes]."""
    return torch.from_numpy(np.packbits(mask.cpu().contiguous().numpy()))


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `packed`: bool of that shape."""
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count).astype(bool)).view(*shape)


def masks_of(model: nn.Module, groups: Iterable[Group], widths: Mapping[str, int]) -> dict[str, str]:
    """The digests of what stays of the weights that `widths` give zeros, as the model holds them."""
    held = dict(model.named_parameters())
    sparse = (g.name for g in groups if g.kind == "weight" and widths[g.name] < g.width)
    return {name: digest(held[name].detach() != 0) for name in sparse if name in held}


def digest(mask: Tensor) -> str:
    """What a policy file says of a mask."""
    return f"sha256:{hashlib.sha256(packed(mask).numpy().tobytes()).hexdigest()}"
