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


class Tally:
    """Sums losses up, batch by batch.

    `loss` is their mean over samples, `by_sample` that of each sample, to 6 digits; empty where losses are not by
    sample.
    """

    def __init__(self) -> None:
        self._total, self._count, self._single = 0.0, 0, list[float]()

    def add(self, losses: Tensor, n: int) -> None:
        """The losses of a batch of `n` samples."""
        values = losses.cpu().double()
        self._total, self._count = self._total + n * float(values.mean()), self._count + n
        if len(values) % n == 0:
            self._single += [float(f"{v:.6g}") for v in values.view(n, -1).mean(1).tolist()]

    @property
    def loss(self) -> float:
        return self._total / self._count

    @property
    def by_sample(self) -> tuple[float, ...]:
        return tuple(self._single) if len(self._single) == self._count else ()
