"""Loss `cosine`: the angle between outputs, for embeddings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cosine(outputs: Tensor, dense_outputs: Tensor, *, classes: int) -> Tensor:
    """One minus the cosine similarity of each sample's outputs, which are taken as one vector."""
    a, b = (t.reshape(len(t), -1) for t in (outputs, dense_outputs))
    still = (a == b).all(1)  # vectors of zeros have no angle, and rounding gives equal ones a small one
    return (1.0 - F.cosine_similarity(a, b)).clamp_min(0.0).masked_fill(still, 0.0)
