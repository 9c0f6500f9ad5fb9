"""The tiered evaluator: from an Ask to an Evaluation on one resident model. The hot path is stitch + forward."""

from __future__ import annotations

import copy
import ctypes
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autoprune import plugins
from autoprune.calibration import Parts, chunks, cut, gather, in_format, prepare, size
from autoprune.database.consumers import consumed
from autoprune.database.stitch import Stitcher
from autoprune.database.store import LevelDatabase
from autoprune.errors import InputError, did_you_mean, one_line
from autoprune.evaluation import Ask, Evaluation, Split
from autoprune.job import Job
from autoprune.losses import FIDELITIES
from autoprune.protocols import Batch, Direction, Task
from autoprune.recover import BATCH_SIZE, Lesson, finetune
from autoprune.repair import FixedPoint, Folded, Reference, Refit, observe
from autoprune.structure import Structure
from autoprune.tracing.wiring import find_sites

COSTS = ("macs", "params", "bytes")
TRIM_EVERY = 50
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Settings:
    """Plain settings of an evaluator.

    `loss` is kl, mse or cosine to the dense outputs, or the name of a task metric with its `direction`.
    """

    loss: str = "kl"
    direction: Direction | None = None
    calibration: int = 2048
    validation: int = 1024
    finetune_steps: int = 100
    costs: tuple[str, ...] = COSTS
    batch_size: int = 256
    seed: int = 0
    device: str = "auto"

    @staticmethod
    def of(job: Job) -> Settings:
        e, loss = job.evaluator, job.objectives.loss
        name, direction = (loss, None) if isinstance(loss, str) else (loss.metric, loss.direction)
        costs = tuple(dict.fromkeys([*COSTS, *job.objectives.costs]))
        return Settings(
            name, direction, e.calibration, e.validation, e.finetune_steps, costs, seed=job.search.seed, device=e.device
        )

    @property
    def torch_device(self) -> torch.device:
        """The device; `auto` is a GPU where there is one.

        Raises:
            InputError: there is no such device here.
        """
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(auto if self.device == "auto" else self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"evaluator.device: {self.device!r} is not to be had here: {one_line(error)}") from None
        return device


def prepared_model(task: Task, device: torch.device, model: nn.Module | None = None) -> nn.Module:
    """The task's model (or another one, in place) as evaluation wants it: eval mode, fast format, on `device`.

    Raises:
        InputError: the model computes in half precision, in which nothing can be solved for.
    """
    model = (task.build() if model is None else model).to(device).eval()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in (torch.float32, torch.float64):
            raise InputError(f"{name} is {parameter.dtype}; give the model in float32: model.float()")
    return in_format(model, fast_format(task, model))


def fast_format(task: Task, model: nn.Module) -> torch.memory_format:
    """channels_last where the model runs in it (one that flattens by `view` does not), else contiguous."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            twin = in_format(copy.deepcopy(model), torch.channels_last)
            twin(*prepare(task.example_inputs(), device, torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def prepared_parts(task: Task, settings: Settings, model: nn.Module) -> Parts:
    """The calibration parts on the settings' device, in the format that suits `model`."""
    parts, device = Parts.of(task, settings.calibration, settings.batch_size), settings.torch_device
    layout = fast_format(task, model)
    return Parts(
        prepare(parts.statistics, device, layout),
        tuple(prepare(b, device, layout) for b in parts.fitness),
        tuple(prepare(b, device, layout) for b in parts.heldback),
        parts.total,
        layout,
    )


def make_evaluator(job_text: str, structure: Structure, database: Path) -> TieredEvaluator:
    """The evaluator of a job from its files: what every worker calls once."""
    bound_kernel_cache(structure)
    keep_blocks()
    job = Job.loads(job_text)
    return TieredEvaluator(job.build_task(), structure, LevelDatabase.open(database), Settings.of(job))


def bound_kernel_cache(structure: Structure) -> None:
    """Let oneDNN keep the kernels of a few candidates instead of 1 024: every width brings new ones, some MB in all.

    It reads the variable once, at its first use in a process; a user's own setting stays.
    """
    weighted = sum(op.weight is not None for op in structure.ops)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(max(128, 4 * weighted)))


def trim_heap() -> None:
    """Give back what glibc holds in fragments: candidates of ever new widths leave a few MB each hundred."""
    with suppress(OSError, AttributeError):  # another C library has no such call
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def keep_blocks() -> None:
    """Let glibc serve blocks up to 64 MB from its heap, where they stay mapped; by default half of that is the most.

    Activations of the statistics batch are of that size, and mapping them anew costs a tenth of a refit.
    """
    with suppress(OSError, AttributeError):  # another C library: nothing is lost but speed
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 64 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


class TieredEvaluator:
    """Calls answer asks. All candidates see the same samples in the same order (common random numbers).

    stitch: the compensated model, each batch repaired by its own fixed-point batch norm. refit: one pass over the
    statistics samples repairs the model, then it is scored on others. tune: refit, then the brief fine-tune.
    `model` is the dense model where it is not the task's own; it must be prepared as `prepared_model` does.
    """

    def __init__(
        self,
        task: Task,
        structure: Structure,
        database: LevelDatabase,
        settings: Settings,
        model: nn.Module | None = None,
    ) -> None:
        self.task, self.structure, self.settings = task, structure, settings
        self.device = settings.torch_device
        dense = prepared_model(task, self.device) if model is None else model
        self.parts = prepared_parts(task, settings, dense)
        self.stitcher = Stitcher(dense, structure, database)
        readers = {w for names in self._readers(dense).values() for w in names}
        self.sites = {n: s for n, s in self._sites.items() if n in readers and s.calls == 1}
        self.statistics = observe(dense, task, self.parts.statistics, self.sites)
        self.dense = dense
        self.references: dict[tuple[Split, int, int], Reference] = {}
        self.costs = {name: plugins.load("costs", name)(structure) for name in settings.costs}
        self._batches: dict[Split, Sequence[Batch]] = {"fitness": self.parts.fitness, "heldback": self.parts.heldback}
        self._lesson: tuple[int, Lesson] | None = None
        self._asked = 0

    def __call__(self, ask: Ask) -> Evaluation:
        """Evaluate; what goes wrong in the model under test becomes the evaluation's error."""
        ask.policy.check(self.structure)
        self._asked += 1
        if self._asked % TRIM_EVERY == 0:
            trim_heap()
        started = time.perf_counter()
        costs = {n: float(cost(ask.policy.array(self.structure))) for n, cost in self.costs.items()}
        try:
            loss, metrics, samples = self._score(ask)
        except (RuntimeError, ArithmeticError) as error:
            self.stitcher.mark_dirty()
            return Evaluation.failed(ask, one_line(error), costs, time.perf_counter() - started)
        seconds = time.perf_counter() - started
        for name, value in {"loss": loss, **metrics}.items():
            if not math.isfinite(value):
                self.stitcher.mark_dirty()
                return Evaluation.failed(ask, f"the {name} is {value}", costs, seconds)
        return Evaluation(ask, loss, costs, metrics, samples / self.parts.total, seconds)

    def repaired(self, ask: Ask) -> nn.Module:
        """The resident model, repaired (and tuned) as the ask's tier says; it changes with the next ask."""
        self._repair(ask)
        return self.stitcher.model

    def batches(self, split: Split) -> Sequence[Batch]:
        """The batches of a split; validation is loaded when it is first asked for."""
        if split not in self._batches:
            whole = gather(self.task.split("validation"), self.settings.validation)
            parts = chunks(whole, self.settings.batch_size)
            self._batches[split] = tuple(prepare(b, self.device, self.parts.layout) for b in parts)
        return self._batches[split]

    def _score(self, ask: Ask) -> tuple[float, Mapping[str, float], float]:
        """Loss, metrics and the samples that went forward (a backward pass counts two)."""
        batches = self._share(self.batches(ask.split), ask.fraction)
        count = sum(size(b) for b in batches)
        direct = ask.tier == "stitch" and ask.split == "fitness" and self.settings.direction is None
        if direct:
            self.stitcher.stitch(ask.policy)
            return self.fidelity(batches, ask.split, direct), {}, count
        samples = self._repair(ask) + count
        metrics: Mapping[str, float] = {}
        if ask.split != "fitness" or self.settings.direction is not None:
            with torch.no_grad():
                metrics = {k: float(v) for k, v in self.task.metrics(self.stitcher.model, batches).items()}
        if self.settings.direction is None:
            return self.fidelity(batches, ask.split, direct), metrics, samples
        value = _metric(metrics, self.settings.loss)
        return (-value if self.settings.direction == "maximize" else value), metrics, samples

    def _repair(self, ask: Ask) -> float:
        model = self.stitcher.stitch(ask.policy)
        if ask.tier == "stitch":
            mode: FixedPoint | Refit = FixedPoint(self.stitcher, self.statistics, settle=True)
        elif ask.tier in ("refit", "tune"):
            mode = Refit(self.stitcher, self.statistics, self.sites)
        else:
            raise InputError(f"the evaluator has no tier {ask.tier!r}; allowed: stitch, refit, tune")
        with torch.no_grad(), mode:
            self.task.outputs(model, self.parts.statistics)
        samples = float(size(self.parts.statistics))
        if ask.tier == "tune":
            self.stitcher.mark_dirty()  # before the first step: whatever happens in it
            try:
                steps = self.settings.finetune_steps
                samples += 3.0 * finetune(model, self.lesson(steps), steps, self.settings.seed)
            finally:
                model.requires_grad_(False)
        return samples

    def lesson(self, steps: int) -> Lesson:
        """The first training samples, as many as `steps` can use, with the dense outputs; the last one is kept."""
        if self._lesson is None or self._lesson[0] != steps:
            samples = prepare(gather(self.task.split("train"), steps * BATCH_SIZE), self.device, self.parts.layout)
            with torch.no_grad():
                parts = [self.task.outputs(self.dense, b) for b in chunks(samples, self.settings.batch_size)]
            teacher = torch.cat(parts)
            classes = teacher.dim() > 1 and teacher.shape[-1] > 1
            fidelity = FIDELITIES.get(self.settings.loss, FIDELITIES["kl" if classes else "mse"])
            self._lesson = steps, Lesson(samples, teacher, self.task.outputs, fidelity)
        return self._lesson[1]

    def fidelity(self, batches: Sequence[Batch], split: Split, direct: bool = False) -> float:
        """Mean loss to the dense outputs over the first batches of a split; `direct`: each repairs itself."""
        total, count, model = 0.0, 0, self.stitcher.model
        measure = FIDELITIES[self.settings.loss]
        for i, batch in enumerate(batches):
            n = size(batch)
            reference = self.reference(split, i, batch)
            with torch.no_grad():
                with self._forward_mode(reference, direct):
                    outputs = self.task.outputs(model, batch)
                total += n * float(measure(outputs, reference.outputs))
            count += n
        return total / count

    def _forward_mode(self, reference: Reference, direct: bool) -> AbstractContextManager[object]:
        """How a batch runs; the dense policy runs as it is, so that it scores exactly as the dense model."""
        if direct:
            return FixedPoint(self.stitcher, reference, settle=False)
        return Folded(self.stitcher.model, self._sites) if self.stitcher.narrowed() else nullcontext()

    def reference(self, split: Split, index: int, batch: Batch) -> Reference:
        """The dense model on a batch of a split, or on its first samples; seen once."""
        key = (split, index, size(batch))
        if key not in self.references:
            self.references[key] = observe(self.dense, self.task, batch)
        return self.references[key]

    def _share(self, batches: Sequence[Batch], fraction: float) -> Sequence[Batch]:
        """Always the same first samples: as many as make up the fraction."""
        if fraction == 1.0:
            return batches
        left, taken = max(1, round(fraction * sum(size(b) for b in batches))), []
        for batch in batches:
            taken.append(batch if size(batch) <= left else cut(batch, 0, left))
            left -= size(taken[-1])
            if left <= 0:
                break
        return taken

    def _readers(self, dense: nn.Module) -> dict[str, list[str]]:
        self._sites = find_sites(dense, self.task.example_inputs())
        return consumed(self.structure.groups, self._sites)


def _metric(metrics: Mapping[str, float], name: str) -> float:
    if name not in metrics:
        raise InputError(f"objectives.loss.metric: the task has no metric {name!r}; {did_you_mean(name, metrics)}")
    return metrics[name]
