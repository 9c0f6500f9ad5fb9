"""Loss `kl`: Kullback-Leibler divergence of the classes' probabilities (Hinton et al. 2015), for logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from autoprune.losses._samples import mean_by_sample


def kl(outputs: Tensor, dense_outputs: Tensor, *, classes: int) -> Tensor:
    """KL(dense || pruned) in nats of logits whose classes lie along `classes`, mean over a sample's other positions."""
    log_p, log_q = dense_outputs.log_softmax(classes), outputs.log_softmax(classes)
    return mean_by_sample(F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(classes))
