"""What can be wrong with a task's data and metrics, found out on the dense model before anything is searched."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from autoprune.database.rows import samples_of, tensors_of
from autoprune.errors import InputError, one_line
from autoprune.evaluator.samples import Samples
from autoprune.evaluator.settings import Settings
from autoprune.protocols import Batch, Task

TOO_MANY = 0.1
"""Share of validation samples that may also be calibration samples, by chance where inputs are few."""
LOOKED_AT = 256
"""Values of a sample that tell it from others, spread over it."""


def check_data(task: Task, dense: nn.Module, settings: Settings, samples: Samples) -> tuple[str, ...]:
    """That splits are large enough and apart, and metrics are numbers; returns what the user ought to know.

    Raises:
        InputError: one of these does not hold.
    """
    parts, validation = samples.parts, samples.batches("validation")
    said = (
        *getattr(task, "samples_said", ()),
        check_enough("calibration", settings.calibration, Settings.calibration, parts.total),
        check_enough("validation", settings.validation, Settings.validation, validation.samples),
    )
    check_apart(parts.all(), validation)
    check_metrics(task, dense, validation)
    return tuple(filter(None, said))


def check_metrics(task: Task, dense: nn.Module, batches: Sequence[Batch]) -> None:
    """That the dense model's metrics on validation are finite numbers, by the names that the task has.

    Raises:
        InputError: they are not, or cannot be computed.
    """
    try:
        with torch.no_grad():
            found = dict(task.metrics(dense, batches))
        values = {name: float(value) for name, value in found.items()}
    except InputError:
        raise
    except Exception as error:  # a user's metrics may fail in any way
        raise InputError(f"the metrics of the dense model on validation fail: {one_line(error)}") from error
    for name, value in values.items():
        if not math.isfinite(value):
            raise InputError(
                f"the metric {name!r} of the dense model on the validation split is {value}; a metric must be a finite "
                "number, so look at its data or leave it out"
            )


def check_apart(calibration: Iterable[Batch], validation: Iterable[Batch]) -> None:
    """That validation holds other samples than calibration; few may be equal by chance, which is said.

    Raises:
        InputError: they share samples.
    """
    known, seen = ({s for batch in part for s in _prints(batch)} for part in (calibration, validation))
    shared = len(known & seen)
    if not shared:
        return
    what = f"the splits calibration and validation share {shared} of {len(seen)} validation samples"
    if shared > TOO_MANY * len(seen):
        raise InputError(f"{what}; figures on validation would flatter what calibration chose, so give other samples")
    warnings.warn(f"{what}; if not by chance, give other samples", stacklevel=2)


def check_enough(what: str, wanted: int, usual: int, found: int) -> str:
    """What to say where a split has fewer samples than the job takes by default; empty where it has enough.

    Raises:
        InputError: the job asks for more than there are.
    """
    if found >= wanted:
        return ""
    if wanted != usual:
        raise InputError(f"evaluator.{what}: the split has {found} samples, the job asks for {wanted}; lower it")
    return f"{what}: all {found} samples of the split are used ({usual} would be by default)"


def _prints(batch: Batch) -> list[bytes]:
    """A fingerprint of each sample's inputs; none of a batch that is one piece."""
    n = samples_of(batch)
    inputs = batch[0] if isinstance(batch, tuple | list) and len(batch) == 2 else batch
    rows = [t.detach().cpu().reshape(n, -1) for t in tensors_of(inputs) if n and t.dim() and len(t) % n == 0]
    if not rows or n is None:
        return []
    thin = [t[:, :: max(1, t.shape[1] // LOOKED_AT)].contiguous().view(torch.uint8) for t in rows]
    return [hashlib.sha256(b"".join(t[i].numpy().tobytes() for t in thin)).digest() for i in range(n)]
