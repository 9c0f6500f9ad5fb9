"""Gradients of the task's own loss over the calibration data, in a copy of the lent model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autoprune.criteria._atoms import named_weights
from autoprune.database.rows import size
from autoprune.errors import InputError
from autoprune.protocols import Batch, Task
from autoprune.tracing.copies import copied, quiet_random_state
from autoprune.tracing.sound_gradients import SoundGradients

SPLIT = "calibration"
"""The only split that a criterion reads: it is the same at every call, and part of what scores are kept under."""


def working_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, batch norms by their running statistics, whose floating parameters all want gradients."""
    work = copied(model).eval()
    for parameter in work.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return work


@contextmanager
def differentiable() -> Iterator[None]:
    """Forward and backward passes inside have gradients that are sound, and draw from a seed: global chance stays."""
    with quiet_random_state(0), SoundGradients():
        yield


def calibration(criterion: str, task: Task) -> Iterator[Batch]:
    """The batches of the calibration split; InputError where there is none."""
    empty = True
    for batch in task.split(SPLIT):
        empty = False
        yield batch
    if empty:
        raise InputError(
            f"criterion {criterion!r} needs data, and the {SPLIT} split of the task yields no batch: give it samples, "
            f"or take a criterion that needs none (l1_norm, synflow)"
        )


def finite_loss(criterion: str, model: nn.Module, task: Task, batch: Batch, hint: str = "") -> Tensor:
    """The task's loss on a batch; InputError, which ends with `hint`, where it is not finite."""
    loss = task.loss(model, batch)
    if not bool(torch.isfinite(loss)):
        raise InputError(f"criterion {criterion!r}: the task's loss is not finite on the {SPLIT} data{hint}")
    return loss


def backward(criterion: str, work: nn.Module, task: Task, batches: Iterable[Batch], hint: str = "") -> Iterator[int]:
    """A backward pass for each batch, after which the gradients lie in the parameters of `work`; yields its samples.

    Raises:
        InputError: the loss of a batch is not finite; it ends with `hint`.
    """
    for batch in batches:
        with differentiable():
            work.zero_grad(set_to_none=True)
            finite_loss(criterion, work, task, batch, hint).backward()
        yield size(batch)


def means(
    criterion: str,
    work: nn.Module,
    names: Sequence[str],
    task: Task,
    term: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[Batch] | None = None,
) -> dict[str, Tensor]:
    """Mean over batches, by their samples, of `term(weight, gradient)` for each of the weights `names`, on the CPU.

    Without `batches` they are those of the calibration split. A weight that the loss does not depend on has zeros.
    """
    weights = named_weights(work, names)
    totals = {name: torch.zeros_like(w, dtype=wide(w)) for name, w in weights.items()}
    samples = 0
    for n in backward(criterion, work, task, calibration(criterion, task) if batches is None else batches):
        samples += n
        for name, weight in weights.items():
            if weight.grad is not None:
                totals[name] += n * term(weight.detach().to(wide(weight)), weight.grad.to(wide(weight)))
    return {name: (total / samples).detach().cpu() for name, total in totals.items()}


def wide(tensor: Tensor) -> torch.dtype:
    """The type that values of a tensor are added up in: float32, or its own where that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)
