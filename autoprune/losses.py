"""How far the pruned outputs are from the dense ones: one number for all samples, and gradients for distillation."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Fidelity = Callable[[Tensor, Tensor], Tensor]
"""(outputs, dense outputs) -> mean over samples, a scalar; 0 where they are equal."""


def kl(outputs: Tensor, dense: Tensor) -> Tensor:
    """KL(dense || pruned) in nats, mean over all rows of logits [..., classes] (Hinton et al. 2015)."""
    log_p, log_q = dense.flatten(0, -2).log_softmax(1), outputs.flatten(0, -2).log_softmax(1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def mse(outputs: Tensor, dense: Tensor) -> Tensor:
    """Squared error relative to the dense outputs' mean square."""
    return F.mse_loss(outputs, dense) / dense.square().mean().clamp_min(1e-12)


def cosine(outputs: Tensor, dense: Tensor) -> Tensor:
    """One minus the cosine similarity of each sample's outputs, mean over samples."""
    return 1.0 - F.cosine_similarity(outputs.flatten(1), dense.flatten(1)).mean()


FIDELITIES: dict[str, Fidelity] = {"kl": kl, "mse": mse, "cosine": cosine}
