"""How far the pruned outputs are from the dense ones: the loss of a run, checked at birth, and its sum over batches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autoprune import plugins
from autoprune.errors import InputError, one_line
from autoprune.evaluator.top_classes import TopClasses, kept_classes
from autoprune.losses._auto import Choice, choose, targets_of
from autoprune.protocols import Batch, Loss, Task
from autoprune.tracing.outputs import faithful

AUTO = "auto"
NOTHING = 1e-4
"""Loss of equal outputs that is rounding."""


@dataclass(frozen=True)
class Fidelity:
    """A loss made ready: (outputs, dense outputs) -> loss of each sample [samples], along the class axis `classes`."""

    name: str
    classes: int
    measure: Loss
    why: str = ""

    def kept_classes(self, outputs: Tensor) -> int | None:
        """How many classes are kept of outputs like these; None: all."""
        return kept_classes(outputs, self.classes) if self.name == "kl" else None

    @property
    def identity(self) -> str:
        """What its values depend on beside the outputs: name and axis, and the source of a user's own."""
        own = f" {plugins.source_digest(self.measure)}" if plugins.is_users("losses", self.name) else ""
        return f"{self.name}{own} along {self.classes}"

    def __call__(self, outputs: Tensor, dense: Tensor | TopClasses) -> Tensor:
        if isinstance(dense, TopClasses):
            return dense.kl(outputs)
        return self.measure(outputs, dense, classes=self.classes)


def fidelity_for(task: Task, dense: nn.Module, batch: Batch, loss: str, classes: int | None = None) -> Fidelity:
    """The loss called `loss` for what `dense` gives on `batch`; `auto` chooses, and `classes` is by default the task's.

    Raises:
        InputError: there is no such loss, it does not do what a loss must, or the outputs are not to be compared.
    """
    with torch.no_grad():
        outputs = _checked(faithful(task, dense, batch))
    stated = classes if classes is not None else getattr(task, "classes", None)
    if stated is not None and not -outputs.dim() <= stated < outputs.dim():
        raise InputError(f"classes={stated} is no axis of the task's outputs {list(outputs.shape)}")
    found = choose(outputs, targets_of(batch), stated)
    which = getattr(task, "output_said", "")
    found = replace(found, why=f"{which}: {found.why}" if which else found.why)
    own = getattr(task, "auto_loss", None)
    if loss == AUTO and own is not None:
        found = Choice(own, found.classes, f"the task states it for its outputs {list(outputs.shape)}")
    if loss != AUTO:
        if loss == "kl" and (outputs.dim() < 2 or outputs.shape[found.classes] == 1):
            raise InputError(
                f"objectives.loss: kl over one value is 0 for every candidate, and the outputs {list(outputs.shape)} "
                f"have one along axis {found.classes}; use auto, bernoulli_kl or mse, or state classes="
            )
        found = Choice(loss, found.classes, "the job names it")
    made = Fidelity(found.name, found.classes, plugins.load("losses", found.name), found.why)
    _check_loss(made, outputs)
    return made


def _checked(outputs: object) -> Tensor:
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or outputs.dim() == 0:
        shown = f"{outputs.dtype} {list(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(
            f"the task's outputs must be a floating tensor with the samples in dimension 0, not {shown}; "
            "say which output counts: autoprune.task(..., outputs=) takes a key, an index or a function"
        )
    if not bool(torch.isfinite(outputs).all()):
        raise InputError(
            "the dense model's outputs on the calibration split are not finite (nan or inf), so no pruned model can "
            "be compared with them; look at the weights and at the samples"
        )
    return outputs


def _check_loss(loss: Fidelity, outputs: Tensor) -> None:
    """That a user's loss can be called, gives one value a sample, and 0 for equal outputs."""
    must = f"loss {loss.name!r} must be a function (outputs, dense_outputs, *, classes) -> Tensor [samples]"
    try:
        found = loss(outputs, outputs)
    except Exception as error:  # a user's function may fail in any way
        raise InputError(f"{must}; it failed on outputs {list(outputs.shape)}: {one_line(error)}") from error
    if not isinstance(found, Tensor) or found.shape != (len(outputs),):
        shown = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"{must}; for outputs {list(outputs.shape)} it gave {shown}")
    if not bool((found.abs() <= NOTHING).all()):
        raise InputError(f"{must}, 0 for equal outputs; it gave up to {float(found.abs().max()):.3g}")


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
