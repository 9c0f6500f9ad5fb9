"""A task's model and calibration data as evaluation wants them: format, device, precision, loss."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autoprune import plugins
from autoprune.database.batches import Parts, cut, digest, in_format, prepare, size
from autoprune.database.drawn import draw, opened
from autoprune.errors import InputError
from autoprune.evaluator.dense_reference import observe
from autoprune.evaluator.fidelity import Fidelity, fidelity_for
from autoprune.evaluator.memory import samples_at_once, with_room
from autoprune.evaluator.precision import LARGEST_ERROR, Precision, Wanted, choose_precision, computing
from autoprune.evaluator.samples import Samples
from autoprune.evaluator.settings import Settings
from autoprune.protocols import Batch, Task
from autoprune.structure import Structure
from autoprune.tracing.copies import copied
from autoprune.tracing.inputs import call_model
from autoprune.tracing.open_attention import open_attentions
from autoprune.tracing.outputs import faithful

LOOKED_AT = 64
"""Samples that tell which loss fits."""


def prepared_model(task: Task, device: torch.device, model: nn.Module | None = None) -> nn.Module:
    """The task's model (or another one, in place) as evaluation wants it: eval mode, fast format, on `device`.

    Raises:
        InputError: the model computes in half precision, in which nothing can be solved for.
    """
    model = (task.build() if model is None else model).to(device).eval()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in (torch.float32, torch.float64):
            raise InputError(f"{name} is {parameter.dtype}; give the model in float32: model.float()")
    return in_format(open_attentions(model), fast_format(task, model))


def fast_format(task: Task, model: nn.Module) -> torch.memory_format:
    """channels_last where the model runs in it (one that flattens by `view` does not), else contiguous."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            twin = in_format(copied(model), torch.channels_last)
            call_model(twin, prepare(task.example_inputs(), device, torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def layout_of(task: Task, model: nn.Module) -> torch.memory_format:
    """The format that `prepared_model` has put a model in; found anew where its weights are the same in both."""
    for weight in (p for p in model.parameters() if p.dim() == 4):
        there = weight.is_contiguous(memory_format=torch.channels_last)
        if there != weight.is_contiguous():
            return torch.channels_last if there else torch.contiguous_format
    return fast_format(task, model)


def prepared_parts(task: Task, settings: Settings, model: nn.Module, folder: Path | None = None) -> Parts:
    """The calibration parts on the settings' device, in the format that suits `model`.

    With a `folder` validation is drawn too, and samples that are many go to files in there as they come.

    Raises:
        RunError: the samples cannot be written.
    """
    if folder is None:
        parts = Parts.of(task, settings.calibration, settings.batch_size)
    else:
        whole = draw(task.split("calibration"), settings.calibration, folder / "calibration")
        validation = draw(task.split("validation"), settings.validation, folder / "validation")
        parts = replace(Parts.cut(whole, settings.batch_size), validation=validation)
    return fitted(replace(parts, layout=layout_of(task, model)), task, settings, model)


def drawn_once(task: Task, settings: Settings, model: nn.Module, place: Path) -> tuple[Parts, str, Path | None]:
    """The parts, their digest, and the folder in `place` in which workers find them, where they are many.

    Raises:
        RunError: the samples cannot be written.
    """
    draft = place / "draft.samples"
    shutil.rmtree(draft, ignore_errors=True)
    parts = prepared_parts(task, settings, model, draft)
    data = digest(parts.all())
    if not draft.exists():
        return parts, data, None
    folder = place / f"{data.removeprefix('sha256:')[:12]}-{settings.validation}.samples"
    if folder.exists():
        shutil.rmtree(draft, ignore_errors=True)  # what is mapped from there stays readable
    else:
        draft.rename(folder)
    return replace(parts, folder=folder), data, folder


def shared_parts(task: Task, settings: Settings, model: nn.Module, folder: Path) -> Parts:
    """The same from the files that another process has written to `folder`; what it kept to itself is drawn anew."""
    split = task.split("calibration")
    whole = opened(split, folder / "calibration") or draw(split, settings.calibration)
    parts = Parts.cut(whole, settings.batch_size)
    parts = replace(parts, validation=opened(task.split("validation"), folder / "validation"), folder=folder)
    return fitted(replace(parts, layout=layout_of(task, model)), task, settings, model)


def fitted(parts: Parts, task: Task, settings: Settings, model: nn.Module) -> Parts:
    """The parts on the settings' device, with how many samples go through `model` there at a time."""
    device = settings.torch_device
    parts = parts.on(device)
    few = prepare(parts.statistics.first(2)[0], device, parts.layout)
    fits, trains = samples_at_once(lambda: faithful(task, model, few), size(few), settings.memory, device)
    return replace(parts, fits=fits, trains=trains)


def resolved_precision(
    task: Task, dense: nn.Module, structure: Structure, settings: Settings, samples: Samples, fidelity: Fidelity
) -> tuple[Precision, float]:
    """The precision to evaluate in, never one that the dense model does not bear, and its loss in that to float32."""
    macs = float(plugins.load("costs", "macs")(structure).dense)
    precision = choose_precision(settings.precision, settings.torch_device, macs)
    if precision == "fp32":
        return precision, 0.0

    def looked() -> float:
        batch = samples.batches("fitness")[0]
        exact, rounded = (observe(dense, task, batch, None, p).outputs for p in ("fp32", precision))
        assert isinstance(rounded, torch.Tensor)
        return float(fidelity(rounded, exact).mean())

    error = with_room(looked, samples.halve)
    if error <= LARGEST_ERROR:
        return precision, error
    warnings.warn(f"{_off(error)}; evaluator.precision: fp32 says so from the start", stacklevel=3)
    return "fp32", error


def course_precision(wanted: Wanted, task: Task, dense: nn.Module, batch: Batch, fidelity: Fidelity) -> Precision:
    """The precision to train in: `wanted`; auto is bfloat16 only where the dense model bears it on `batch`."""
    if wanted != "auto":
        return wanted
    device = next((p.device for p in dense.parameters()), torch.device("cpu"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        exact = faithful(task, dense, batch)
    precision = choose_precision("auto", device, counter.get_total_flops() / 2 / size(batch))
    if precision == "fp32":
        return precision
    with torch.no_grad(), computing(dense, precision):
        error = float(fidelity(faithful(task, dense, batch), exact).mean())
    if error <= LARGEST_ERROR:
        return precision
    warnings.warn(f"{_off(error)}; recovery.options.precision: fp32 says so from the start", stacklevel=3)
    return "fp32"


def _off(error: float) -> str:
    return (
        f"in bfloat16 the dense model's outputs are off by {error:.2g} (at most {LARGEST_ERROR:g} is allowed), so "
        "everything is computed in float32"
    )


def resolved_fidelity(task: Task, dense: nn.Module, settings: Settings, samples: Samples) -> Fidelity:
    """The loss of the settings, made ready for what the dense model gives on the first fitness samples."""

    def looked() -> Fidelity:
        batch = samples.batches("fitness")[0]
        return fidelity_for(task, dense, cut(batch, 0, LOOKED_AT), settings.loss, settings.classes)

    return with_room(looked, samples.halve)
