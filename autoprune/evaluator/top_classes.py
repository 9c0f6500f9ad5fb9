"""Dense outputs over many classes as the likeliest of them, and the rest as one mass: what a KL needs of a vocabulary.

The KL over the classes kept and the rest is never above that over all, and below it by the mass of the rest times the
KL within the rest: one to two thousandths of it where a thousandth of the mass is left out, which is less than what a
thousand windows of text leave uncertain (docs/measured.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.losses._samples import mean_by_sample

MANY = 2048
"""Classes up to which all are kept: their outputs take little beside anything else."""
FEWEST, REST = 64, 0.001
"""Classes that are kept at least, and the mass of the others, as a mean over the dense model's distributions."""
LEAST = 1e-12


@dataclass(frozen=True, eq=False)
class TopClasses:
    """Log probabilities of the `index` likeliest classes [..., k] and of all others together [...].

    `axis` is that of the classes in the outputs that they are compared with.
    """

    log_p: Tensor
    index: Tensor
    rest: Tensor
    axis: int

    @staticmethod
    def of(outputs: Tensor, axis: int, k: int) -> TopClasses:
        """From logits."""
        log_p, index = outputs.movedim(axis, -1).log_softmax(-1).topk(k, -1)
        return TopClasses(log_p, index.int(), _rest(log_p), axis)

    def kl(self, outputs: Tensor) -> Tensor:
        """KL(dense || pruned) in nats of each sample, as losses.kl gives it, of the classes kept and the rest."""
        log_q = outputs.movedim(self.axis, -1).log_softmax(-1).gather(-1, self.index.long())
        kept = (self.log_p.exp() * (self.log_p - log_q)).sum(-1)
        return mean_by_sample(kept + self.rest.exp() * (self.rest - _rest(log_q)))


def kept_classes(outputs: Tensor, axis: int) -> int | None:
    """How many classes to keep of outputs like these: a power of two; None where all are kept."""
    classes = outputs.shape[axis]
    if classes <= MANY:
        return None
    p = outputs.movedim(axis, -1).softmax(-1).flatten(0, -2)
    mass = p[:: max(1, len(p) // 1024)].sort(-1, descending=True).values.cumsum(-1).mean(0)
    k = FEWEST
    while k < classes // 4:
        if float(mass[k - 1]) >= 1.0 - REST:
            return k
        k *= 2
    return None


def joined_outputs(parts: Sequence[Tensor | TopClasses]) -> Tensor | TopClasses:
    """Outputs of batches that follow each other."""
    tops = [part for part in parts if isinstance(part, TopClasses)]
    if not tops:
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    log_p, index, rest = (torch.cat([getattr(top, name) for top in tops]) for name in ("log_p", "index", "rest"))
    return TopClasses(log_p, index, rest, tops[0].axis)


def _rest(log_p: Tensor) -> Tensor:
    """Log of what is left of all mass."""
    return (1.0 - log_p.exp().sum(-1)).clamp_min(LEAST).log()
