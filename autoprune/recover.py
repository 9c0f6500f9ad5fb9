"""Fine-tuning of a pruned model by distillation from the dense one: proxy in the search, recovery after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.calibration import size, take
from autoprune.gradients import SoundGradients
from autoprune.losses import Fidelity
from autoprune.precision import Precision, computing
from autoprune.protocols import Batch
from autoprune.repair import Folded
from autoprune.tracing.wiring import Site, batch_norms

BATCH_SIZE = 128
MAX_NORM = 1.0
"""Largest gradient norm: with fixed statistics a batch norm no longer tames a large step."""


@dataclass(frozen=True)
class Lesson:
    """Training samples as one batch, the dense outputs for them, and the loss between outputs; how to compute it fast.

    `sites` say which batch norm can be folded into which weight.
    """

    samples: Batch
    teacher: Tensor
    outputs: Callable[[nn.Module, Batch], Tensor]
    fidelity: Fidelity
    sites: Mapping[str, Site]
    precision: Precision = "fp32"


def finetune(model: nn.Module, lesson: Lesson, steps: int, seed: int, at_once: int = BATCH_SIZE) -> int:
    """Train `model` in place for `steps` optimizer steps; returns the samples seen.

    SGD with Nesterov momentum where there are batch norms, else AdamW; linear warm-up over a tenth, then cosine. Batch
    norms train their scale and shift and keep their repaired statistics: those of a batch would undo the repair; so
    they can be folded into the weights before them, which saves a sixth of a step. The order of the samples and dropout
    depend on `seed` alone, so that all candidates learn alike. The forward runs in the lesson's precision, weights and
    loss are float32; a batch goes through in parts of `at_once` samples.

    Raises:
        ArithmeticError: the loss is not finite.
    """
    norms = batch_norms(model).values()
    optimizer = _optimizer(model, bool(norms))
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, warm, steps))
    seen = 0
    model.train()
    for norm in norms:
        norm.eval()
    with torch.enable_grad(), computing(model, lesson.precision), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout draws from the global generator
        for step, index in enumerate(_batches(size(lesson.samples), steps, seed)):
            optimizer.zero_grad(set_to_none=True)
            loss = _backward(model, lesson, index, at_once)
            if not math.isfinite(loss):
                raise ArithmeticError(f"the fine-tuning loss is {loss} at step {step}")
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            schedule.step()
            seen += len(index)
    model.zero_grad(set_to_none=True)
    model.eval()
    return seen


def _backward(model: nn.Module, lesson: Lesson, index: Tensor, at_once: int) -> float:
    """Gradients of the samples at `index`; returns their loss."""
    total = 0.0
    for part in index.to(lesson.teacher.device).split(at_once):
        with SoundGradients(), Folded(model, lesson.sites):
            outputs = lesson.outputs(model, take(lesson.samples, part))
        loss = lesson.fidelity(outputs, lesson.teacher[part]).mean() * (len(part) / len(index))
        loss.backward()
        total += loss.item()
    return total


def _optimizer(model: nn.Module, convolutional: bool) -> torch.optim.Optimizer:
    parameters = [p.requires_grad_(True) for p in model.parameters()]
    if convolutional:
        return torch.optim.SGD(parameters, 0.02, momentum=0.9, nesterov=True, weight_decay=1e-4)
    return torch.optim.AdamW(parameters, 1e-3, weight_decay=0.01)


def _batches(samples: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of each step's batch: whole batches of one random order after the other."""
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < min(BATCH_SIZE, samples):
            order = torch.randperm(samples, generator=generator)
        yield order[:BATCH_SIZE]
        order = order[BATCH_SIZE:]


def _rate(step: int, warm: int, steps: int) -> float:
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
