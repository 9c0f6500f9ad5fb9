"""Loss `bernoulli_kl`: the divergence of yes-or-no probabilities, for one logit or for several labels at once."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from autoprune.losses._samples import mean_by_sample


def bernoulli_kl(outputs: Tensor, dense_outputs: Tensor, *, classes: int) -> Tensor:
    """KL(dense || pruned) in nats of independent Bernoulli logits, mean over all of a sample; no axis is special."""
    yes = dense_outputs.sigmoid() * (logsigmoid(dense_outputs) - logsigmoid(outputs))
    no = (-dense_outputs).sigmoid() * (logsigmoid(-dense_outputs) - logsigmoid(-outputs))
    return mean_by_sample(yes + no)
