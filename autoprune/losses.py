"""How far the pruned outputs are from the dense ones: one number for each sample; also gradients for distillation."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Fidelity = Callable[[Tensor, Tensor], Tensor]
"""(outputs, dense outputs), samples in dimension 0 -> loss of each sample [samples]; 0 where they are equal."""


def kl(outputs: Tensor, dense: Tensor) -> Tensor:
    """KL(dense || pruned) in nats of logits [samples, ..., classes], mean over a sample's rows (Hinton et al. 2015)."""
    log_p, log_q = dense.log_softmax(-1), outputs.log_softmax(-1)
    return _by_sample(F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1))


def mse(outputs: Tensor, dense: Tensor) -> Tensor:
    """Squared error relative to the mean square of all dense outputs."""
    return _by_sample(F.mse_loss(outputs, dense, reduction="none")) / dense.square().mean().clamp_min(1e-12)


def cosine(outputs: Tensor, dense: Tensor) -> Tensor:
    """One minus the cosine similarity of each sample's outputs."""
    return 1.0 - F.cosine_similarity(outputs.flatten(1), dense.flatten(1))


def _by_sample(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).mean(1)


FIDELITIES: dict[str, Fidelity] = {"kl": kl, "mse": mse, "cosine": cosine}
