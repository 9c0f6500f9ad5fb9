"""Which numbers of a weight are not zero, as packed bits and under the hash that policy files know them by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def packed(mask: Tensor) -> Tensor:
    """Bits of a bool tensor in the order of its numbers, eight a byte, the first one the highest: uint8 [bytes]."""
    return torch.from_numpy(np.packbits(mask.cpu().contiguous().numpy()))


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `packed`: bool of that shape."""
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count).astype(bool)).view(*shape)


def digest(mask: Tensor) -> str:
    """What a policy file says of a mask."""
    return f"sha256:{hashlib.sha256(packed(mask).numpy().tobytes()).hexdigest()}"
