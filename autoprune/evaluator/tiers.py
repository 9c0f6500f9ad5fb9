"""The tiered evaluator: from an Ask to an Evaluation on one resident model. The hot path is stitch + forward."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from autoprune.costs import build_cost
from autoprune.costs._latency_table import LatencyTable
from autoprune.database.batches import Parts, size
from autoprune.database.consumers import consumed
from autoprune.database.drawn import Drawn
from autoprune.database.stitch import Stitcher
from autoprune.database.store import LevelDatabase
from autoprune.database.zeros import patterned_weights
from autoprune.errors import InputError, one_line
from autoprune.evaluation import Ask, Evaluation, Split
from autoprune.evaluator.dense_reference import Reference
from autoprune.evaluator.fidelity import Tally
from autoprune.evaluator.finetune import Course, Lesson, Recipe, usual_rate
from autoprune.evaluator.judge import Judge, Score, Way
from autoprune.evaluator.keep_best import (
    checks,
    copied,
    find_rate,
    keep_best,
    probe_lengths,
    restore,
    scorings,
)
from autoprune.evaluator.lock_step import Meet, OutOfStepError, in_step
from autoprune.evaluator.material import Reading, material_for
from autoprune.evaluator.memory import is_out_of_memory, trim_heap, with_room
from autoprune.evaluator.one_pass import Once, repeating
from autoprune.evaluator.precision import cast, computing, repeatable
from autoprune.evaluator.prepared import prepared_model, prepared_parts, resolved_fidelity, resolved_precision
from autoprune.evaluator.repair import FixedPoint, Folded, Refit
from autoprune.evaluator.samples import Samples, Seen
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.top_classes import joined_outputs
from autoprune.policy import Policy
from autoprune.protocols import Batch, Task
from autoprune.structure import Structure
from autoprune.tracing.copies import sharing
from autoprune.tracing.one_thread import one_thread
from autoprune.tracing.outputs import faithful
from autoprune.tracing.padding import real_tokens
from autoprune.tracing.slim import named_tensors
from autoprune.tracing.wiring import batch_norms, find_sites

TRIM_EVERY = 50
PROBED_SHARE = 0.5
"""Of every width, where the peak rate is probed. Nearer to dense there is little to gain, and the rate that moves least
wins: .00025 at .7 of the digits network, against .06 at .5, with which 100 steps take off half of the loss there."""

Mode = Callable[[Reference, Batch, Meet], AbstractContextManager[object]]
"""What a repair does during the forward pass of one batch."""


class TieredEvaluator:
    """Calls answer asks. All candidates see the same samples in the same order (common random numbers).

    stitch: the compensated model, each batch repaired by its own fixed-point batch norm. refit: one pass over the
    statistics samples repairs the model, then it is scored on others. tune: refit, then the brief fine-tune.
    `model` is the dense model where it is not the task's own, `parts` the calibration data where they are at hand; they
    must be prepared as `prepared_model` and `prepared_parts` do. Everything is computed on one thread.
    `measure` is the loss between outputs, also where the search minimises a metric: the fine-tune learns from it.
    `precision` is the one in use; `precision_error` the loss of the dense model in bfloat16 to itself in float32.
    """

    @one_thread()
    def __init__(
        self,
        task: Task,
        structure: Structure,
        database: LevelDatabase,
        settings: Settings,
        model: nn.Module | None = None,
        latency: LatencyTable | None = None,
        parts: Parts | None = None,
    ) -> None:
        self.task, self.structure, self.settings = task, structure, settings
        self.device = settings.torch_device
        self.dense = dense = prepared_model(task, self.device) if model is None else model
        self.parts = prepared_parts(task, settings, dense) if parts is None else parts
        self.stitcher = Stitcher(dense, structure, database, compensated=settings.repair == "full")
        self.costs = {name: build_cost(name, structure, latency) for name in settings.costs}
        self._all_sites = find_sites(dense, task.example_inputs())
        readers = {w for names in consumed(structure.groups, self._all_sites).values() for w in names}
        readers |= {name for g in structure if g.kind == "weight" for name in g.matrices}
        self._patterned = patterned_weights(dense)
        fitted = readers - self._patterned
        self.sites = {n: s for n, s in self._all_sites.items() if n in fitted and s.calls == 1}
        self.samples = Samples(task, dense, self.parts, self.device, settings.batch_size, settings.validation)
        self.measure = resolved_fidelity(task, dense, settings, self.samples)
        self.precision, self.precision_error = resolved_precision(
            task, dense, structure, settings, self.samples, self.measure
        )
        self.samples.precision, self.samples.measure = self.precision, self.measure
        self.samples.look(self.sites)
        self.judge = Judge(task, settings, self.samples, self.measure)
        self._lesson: tuple[int, Lesson] | None = None
        self._rate = settings.learning_rate
        self._asked = 0

    @one_thread()
    def __call__(self, ask: Ask) -> Evaluation:
        """Evaluate; what goes wrong in the model under test becomes the evaluation's error."""
        ask.policy.check(self.structure)
        self._asked += 1
        if self._asked % TRIM_EVERY == 0:
            trim_heap()
        started = time.perf_counter()
        costs = {n: float(cost(ask.policy.array(self.structure))) for n, cost in self.costs.items()}
        try:
            score = with_room(lambda: self._score(ask), lambda: self._make_room(ask))
        except (RuntimeError, ArithmeticError) as error:
            self.stitcher.mark_dirty()
            return Evaluation.failed(ask, one_line(error), costs, time.perf_counter() - started)
        seconds = time.perf_counter() - started
        for name, value in (("the loss", score.loss), *((f"the metric {n}", v) for n, v in score.metrics.items())):
            if not math.isfinite(value):
                self.stitcher.mark_dirty()
                return Evaluation.failed(ask, f"{name} is {value}", costs, seconds)
        passes = score.samples / self.parts.total
        masks = self.stitcher.mask_digests() if ask.split == "validation" else {}
        return Evaluation(ask, score.loss, costs, score.metrics, passes, seconds, None, score.single, masks)

    @one_thread()
    def repaired(self, ask: Ask) -> nn.Module:
        """The resident model, repaired (and tuned) as the ask's tier says; it changes with the next ask."""
        with_room(lambda: self._repair(ask), lambda: self._make_room(ask))
        return self.stitcher.model

    def batches(self, split: Split) -> Drawn:
        """The batches of a split."""
        return self.samples.batches(split)

    @one_thread()
    def fidelity(self, batches: Sequence[Batch], split: Split, direct: bool = False) -> float:
        """Mean loss to the dense outputs over the first batches of a split; `direct`: each repairs itself."""
        return self._losses(batches, split, direct)[0]

    @one_thread()
    def standing(self, split: Split) -> Score:
        """The resident model as it stands, on a whole split, with metrics."""
        return self.judge.standing(self.stitcher.model, split, self._forward_mode)

    @one_thread()
    def standing_of(self, model: nn.Module, split: Split) -> Score:
        """The same of another pruned model of the dense one."""
        return self.judge.standing(model, split, self._way_of(model))

    @one_thread()
    def held_back(self, model: nn.Module) -> float:
        """What the search minimises, of a pruned model on the held-back samples; inf where that is no number."""
        return self.judge.held_back(model, self._way_of(model))

    @one_thread()
    def lesson(self, steps: int) -> Lesson:
        """What a fine-tune of `steps` learns from; the last one is kept."""
        if self._lesson is None or self._lesson[0] != steps:
            reading = Reading(at_once=self.samples.batch_size, precision=self.precision)
            material = material_for(self.task, self.dense, steps, self.settings.seed, self.parts.layout, reading)
            self._lesson = (
                steps,
                Lesson(
                    material,
                    partial(faithful, self.task),
                    self.measure,
                    sites=self._all_sites,
                    precision=self.precision,
                    task_loss=self.task.loss,
                    patterned=self._patterned,
                ),
            )
        return self._lesson[1]

    def _trained(self, steps: int) -> float:
        """The brief fine-tune of the resident model; samples that were trained on."""
        model, course = self.stitcher.model, self._course(steps, self.found_rate(steps))
        try:
            keep_best(model, course.run(checks(steps)), self._held_back, checks(steps))
        finally:
            model.requires_grad_(False)
        return float(course.seen)

    @one_thread()
    def found_rate(self, steps: int) -> float:
        """The peak learning rate of a fine-tune: that of the settings, or the best of a few probes, once."""
        if self._rate is None:
            train = partial(self._short, steps)
            self._rate = self.probed_rate(train, lambda model: usual_rate(bool(batch_norms(model))), steps)
        return self._rate

    def _short(self, steps: int, rate: float, short: int) -> int:
        return self._course(steps, rate, short).advance(short)

    @one_thread()
    def probed_rate(
        self, train: Callable[[float, int], object], usual: Callable[[nn.Module], float], steps: int
    ) -> float:
        """The best peak rate for a course of `steps`; the resident model comes back as it was.

        `train` gives it a short course, of a rate and so many steps; `usual` is asked for the rate to look around, of
        the model that is probed.
        """
        policy, model = self.stitcher.policy, self.stitcher.model
        weights = copied(model)
        try:
            found = with_room(lambda: self._probed(train, usual, steps), self._make_room)
        finally:
            model.requires_grad_(False)
        self.stitcher.stitch(policy)
        self.stitcher.mark_dirty()
        restore(model, weights)
        return found

    def _score(self, ask: Ask) -> Score:
        """A backward pass counts as two passes forward."""
        direct = _repairs_itself(ask) and self.settings.metric is None and self.settings.repair != "none"
        split, batches = ask.split, self.samples.share(ask.split, ask.fraction, direct)
        count = float(batches.samples)
        if self.settings.metric is not None:
            samples = self._repair(ask) + count
            metrics = self._metrics(batches, split)
            return Score(self.judge.signed(metrics), samples, metrics)
        whole = ask.fraction == 1.0 and self.settings.metrics_on_fitness
        watched = split == "heldback" or (split == "fitness" and whole)
        if direct:
            self.stitcher.stitch(ask.policy)
        samples = count + (0.0 if direct else self._repair(ask))
        if watched and not direct:
            loss, metrics, again = self._at_once(batches, split)
            return Score(loss, samples + again * count, metrics)
        loss, single = self._losses(batches, split, direct)
        if split == "fitness" and not watched:
            return Score(loss, samples)
        samples += count + (self._repair(ask) if direct else 0.0)  # each batch had repaired itself; float32 is apart
        return Score(loss, samples, self._metrics(batches, split), single if split == "validation" else ())

    def _at_once(self, batches: Drawn, split: Split) -> tuple[float, Mapping[str, float], float]:
        """Loss and metrics in one pass, and how many more the metrics took: none if they ask the model the same."""
        model, tally = self.stitcher.model, Tally()
        references = self.samples.references(split, batches)

        def score(i: int, batch: Batch) -> None:
            outputs = faithful(self.task, model, batch)
            tally.add(self.measure(outputs, references[i].outputs), size(batch))

        precision = self.samples.precision_on(split)
        with torch.no_grad(), computing(model, precision), self._forward_mode(), repeating(model) as repeat:
            once = Once(batches, score, repeat)
            metrics = {k: float(v) for k, v in self.task.metrics(model, once).items()}
            again = once.finish()
        return tally.loss, metrics, again

    def _losses(self, batches: Sequence[Batch], split: Split, direct: bool) -> tuple[float, tuple[float, ...]]:
        """The mean loss and, to 6 digits, that of each sample; none of these where outputs are not by sample."""
        if not direct:
            return self.judge.losses(self.stitcher.model, batches, split, self._forward_mode)
        tally = Tally()
        for i, batch in enumerate(batches):
            tally.add(self._loss_of_own(i, size(batch)), size(batch))
        return tally.loss, tally.by_sample

    def _loss_of_own(self, index: int, samples: int) -> Tensor:
        """The losses of the first samples of a fitness batch that repairs itself."""
        seen = self.samples.own(index, samples)
        outputs = self._in_step(seen, lambda reference, batch, meet: FixedPoint(self.stitcher, reference, False, meet))
        with torch.no_grad():
            return self.measure(torch.cat(outputs), joined_outputs([r.outputs for r in seen.references]))

    def _in_step(self, seen: Seen, mode: Mode) -> list[Tensor]:
        """Outputs of the resident model on batches that are repaired together, each in the `mode` for its reference."""
        model, several = self.stitcher.model, len(seen.batches) > 1

        def forward(i: int, meet: Meet) -> Tensor:
            own = sharing(model) if several else model
            batch = seen.batches[i]
            with torch.no_grad(), cast(own, self.precision), mode(seen.references[i], batch, meet):
                return faithful(self.task, own, batch)

        with repeatable(model):
            return in_step([partial(forward, i) for i in range(len(seen.batches))])

    def _metrics(self, batches: Sequence[Batch], split: Split) -> Mapping[str, float]:
        return self.judge.metrics(self.stitcher.model, batches, split, self._forward_mode)

    def _forward_mode(self) -> AbstractContextManager[object]:
        """How a batch runs; a dense model as it is, so that it is exact."""
        return Folded(self.stitcher.model, self._all_sites) if self.stitcher.narrowed() else nullcontext()

    def _way_of(self, model: nn.Module) -> Way:
        """The same for another model."""
        held = named_tensors(model)
        whole = all(n in held and held[n].shape == t.shape for n, t in self.stitcher.dense.items())
        return nullcontext if whole else lambda: Folded(model, self._all_sites)

    def _repair(self, ask: Ask) -> float:
        """Samples that went forward."""
        if ask.tier not in ("stitch", "refit", "tune"):
            raise InputError(f"the evaluator has no tier {ask.tier!r}; allowed: stitch, refit, tune")
        with_room(lambda: self._settle(ask), self._shrink_statistics)
        samples = float(self.samples.statistics.samples) if self.settings.repair != "none" else 0.0
        if ask.tier == "tune":
            steps = self.settings.finetune_steps
            heldback = self.samples.batches("heldback").samples
            samples += 3.0 * self._trained(steps) + scorings(steps) * heldback
        return samples

    def _course(self, steps: int, rate: float, schedule: int | None = None) -> Course:
        """A fine-tune of the resident model from where it stands, on the lesson of `steps`."""
        lesson, at_once = self.lesson(steps), self.samples.trained_at_once
        self.stitcher.mark_dirty()  # before the first step: whatever happens in it
        masks, seed = dict(self.stitcher.masks), self.settings.seed
        return Course(self.stitcher.model, lesson, schedule or steps, seed, at_once, Recipe(rate), masks=masks)

    def _probed(self, train: Callable[[float, int], object], usual: Callable[[nn.Module], float], steps: int) -> float:
        """The peak rate for a policy that depends on nothing but the structure, so that any ask finds the same."""
        model = self.stitcher.model
        middle = {g.name: min(g.grid, key=lambda w: (abs(w - PROBED_SHARE * g.width), -w)) for g in self.structure}
        self._settle(Ask(Policy.of(middle), "refit"))
        start = copied(model)

        def loss() -> float:
            found = self.fidelity(self.samples.batches("heldback"), "heldback")
            return found if math.isfinite(found) else math.inf

        def probe(rate: float, length: int) -> float:
            restore(model, start)
            self.stitcher.mark_dirty()
            try:
                train(rate, length)
            except (ArithmeticError, RuntimeError) as error:  # a model may run in eval mode alone once it is narrow
                if is_out_of_memory(error):
                    raise
                return math.inf
            return loss()

        return find_rate(probe, usual(model), loss(), probe_lengths(steps))

    def _held_back(self) -> float:
        """What the search minimises, of the resident model on the held-back samples; inf where that is no number."""
        return self.judge.held_back(self.stitcher.model, self._forward_mode)

    def _settle(self, ask: Ask) -> None:
        """Stitch, and one pass over the statistics samples that repairs."""

        def mode(reference: Reference, batch: Batch, meet: Meet) -> FixedPoint | Refit:
            if ask.tier == "stitch" or self.settings.repair == "norm":
                return FixedPoint(self.stitcher, reference, True, meet)
            return Refit(self.stitcher, reference, self.sites, meet, real_tokens(batch))

        self.stitcher.stitch(ask.policy)
        if self.settings.repair == "none":
            return
        try:
            self._in_step(self.samples.seen, mode)
        except OutOfStepError:
            self.stitcher.mark_dirty()
            self.samples.keep_one_kind()
            self.stitcher.stitch(ask.policy)
            self._in_step(self.samples.seen, mode)

    def _make_room(self, ask: Ask | None = None) -> bool:
        self.stitcher.mark_dirty()
        if ask is not None and _repairs_itself(ask) and self.samples.halve_at_once():
            return True
        return self.samples.halve()

    def _shrink_statistics(self) -> bool:
        self.stitcher.mark_dirty()
        return self.samples.halve_statistics()


def _repairs_itself(ask: Ask) -> bool:
    """Whether each batch is repaired by its own statistics, so that the loss depends on which samples share one."""
    return ask.tier == "stitch" and ask.split == "fitness"
