"""What a weight does for the gradient flow (Wang et al. 2020, Picking Winning Tickets Before Training: GraSP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoprune.criteria._atoms import named_weights, summed_by_atom
from autoprune.criteria._gradients import calibration, differentiable, finite_loss, means, wide, working_copy
from autoprune.database.rows import size
from autoprune.errors import InputError, one_line
from autoprune.protocols import Batch, Task
from autoprune.structure import Group

NAME = "grasp"


class Grasp:
    """w * (H g), with gradient g and Hessian H of the mean loss over all calibration samples; of an atom the sum.

    To first order g'g falls by twice that when the weight goes. The paper removes the weights of the highest
    S = -w * (H g), so this is -S: what carries the flow is kept. g and H are those of all weights of two dimensions and
    more, whichever are scored. The paper divides the logits by a temperature of 200 and takes new weights; here the
    loss is the task's own, at the weights as they are.

    Raises:
        InputError: the model cannot be differentiated twice.
    """

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        return summed_by_atom(model, groups, lambda names: self.weights(model, names, task))

    def weights(self, model: nn.Module, names: Sequence[str], task: Task) -> Mapping[str, Tensor]:
        work = working_copy(model)
        matrices = {name: p for name, p in work.named_parameters() if p.requires_grad and p.dim() > 1}
        slopes = means(NAME, work, tuple(matrices), task, lambda _, slope: slope)
        thetas = tuple(matrices.values())
        flow = [slopes[name].to(p) for name, p in matrices.items()]
        totals, samples = [torch.zeros_like(p, dtype=wide(p), requires_grad=False) for p in thetas], 0
        for batch in calibration(NAME, task):
            samples += size(batch)
            for total, curved in zip(totals, _curvature(work, task, batch, thetas, flow), strict=True):
                if curved is not None:
                    total += size(batch) * curved
        found = {id(p): total / samples for p, total in zip(thetas, totals, strict=True)}
        scored = named_weights(work, names)
        return {name: (p.detach().to(wide(p)) * found[id(p)]).cpu() for name, p in scored.items()}


def _curvature(
    work: nn.Module, task: Task, batch: Batch, thetas: Sequence[Tensor], flow: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """H g of the loss on one batch, for the gradient `flow` of all of them; None for what it does not depend on."""
    work.zero_grad(set_to_none=True)
    try:
        with differentiable(), sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no second derivative
            loss = finite_loss(NAME, work, task, batch)
            slopes = torch.autograd.grad(loss, thetas, create_graph=True, allow_unused=True)
            product = sum((s * g).sum() for s, g in zip(slopes, flow, strict=True) if s is not None)
            if isinstance(product, Tensor) and product.requires_grad:  # else it is linear in the weights
                product.backward()  # goes through the whole graph: `grad` passes by what cannot be differentiated twice
    except RuntimeError as error:
        if not any(word in str(error) for word in ("derivative", "differentiat")):
            raise
        raise InputError(
            f"criterion {NAME!r}: the model or its loss cannot be differentiated twice ({one_line(error)}); take "
            f"another criterion (snip, taylor)"
        ) from error
    return [theta.grad for theta in thetas]
