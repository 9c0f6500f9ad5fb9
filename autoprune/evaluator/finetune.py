"""Fine-tuning of a pruned model, by default by distillation from the dense one: proxy in the search, recovery later."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.database.zeros import masked_weights
from autoprune.errors import InputError
from autoprune.evaluator.averaged import Average
from autoprune.evaluator.eight_bits import EightBits
from autoprune.evaluator.features import Features, feature_loss, noted
from autoprune.evaluator.fidelity import Fidelity
from autoprune.evaluator.material import BATCH_SIZE, Material, Portion, Step
from autoprune.evaluator.optimizers import OptimizerChoice
from autoprune.evaluator.precision import Precision, computing
from autoprune.evaluator.repair import Folded
from autoprune.evaluator.schedules import ScheduleChoice
from autoprune.protocols import Batch, Progress
from autoprune.tracing.one_thread import one_thread
from autoprune.tracing.sound_gradients import SoundGradients
from autoprune.tracing.wiring import Site, batch_norms

Masks = Mapping[str, Tensor]
"""Bool tensors shaped like the parameters of these names: where one is False the weight is zero."""
Masking = Callable[[int, Mapping[str, nn.Parameter], Masks], Masks | None]
"""(step from 0, parameters with their gradients, what is held) -> masks that hold from that step on, None: as before.

It sees the exact weights that train, and gradients of all of them, those that are held at zero too.
"""
MAX_NORM = 1.0
"""Largest gradient norm: with fixed statistics a batch norm no longer tames a large step."""


@dataclass(frozen=True)
class Lesson:
    """Training samples with the dense outputs, the loss between outputs; how to compute it fast.

    `sites` say which batch norm can be folded into which weight; `task_loss` is the task's own, for a recipe that does
    not distil alone. The zeros of `patterned` weights stay, however few there are. `features` are the modules that are
    taught as well; their dense outputs come with the material, and nothing may be folded there.
    """

    material: Material
    outputs: Callable[[nn.Module, Batch], Tensor]
    fidelity: Fidelity
    sites: Mapping[str, Site]
    precision: Precision = "fp32"
    task_loss: Callable[[nn.Module, Batch], Tensor] | None = None
    patterned: frozenset[str] = frozenset()
    features: Features | None = None


@dataclass(frozen=True)
class Recipe:
    """The peak learning rate (None: the optimizer's usual one) and the share of distillation in the loss.

    The rest of the loss is the task's own; `feature_weight` times that of the features comes on top. Gradients are
    clipped to the norm `max_norm` (None: not at all), `ema` is the decay of the weights' average (None: there is none).
    With `running` batch norms go by each batch and gather their statistics anew, where nothing may be folded.
    """

    learning_rate: float | None = None
    distillation: float = 1.0
    optimizer: OptimizerChoice = field(default_factory=OptimizerChoice)
    schedule: ScheduleChoice = field(default_factory=ScheduleChoice)
    max_norm: float | None = MAX_NORM
    ema: float | None = None
    feature_weight: float = 0.0
    running: bool = False


class Course:
    """A fine-tune of `steps` optimizer steps, in as many parts as wanted; stopped and gone on with changes nothing.

    By default SGD with Nesterov momentum where there are batch norms, else AdamW; linear warm-up over a tenth, then
    cosine. Batch norms train their scale and shift and keep their repaired statistics: those of a batch undo the
    repair; so they can be folded into the weights before them, which saves a sixth of a step. The order of the samples
    and dropout depend on `seed` alone, so that all candidates learn alike. The forward runs in the lesson's precision,
    weights and loss are float32; a batch goes through in parts of `at_once` samples. `after_step` is told each step's
    rate. With an average of the weights, that is what the model holds between two calls. Weights that 8 bits hold are
    so at every step. What `masks` leave out stays zero (where none are given, the zeros of `masked_weights`), and so do
    the zeros of the lesson's patterned weights, in an average as well; they have no part in the clipping and in what
    the optimizer keeps; `follow` has them change.
    """

    def __init__(
        self,
        model: nn.Module,
        lesson: Lesson,
        steps: int,
        seed: int,
        at_once: int = BATCH_SIZE,
        recipe: Recipe | None = None,
        after_step: Callable[[float], None] | None = None,
        masks: Masks | None = None,
    ) -> None:
        self.done, self.seen, self.loss = 0, 0, math.nan
        self._model, self._lesson, self._steps, self._seed, self._at_once = model, lesson, steps, seed, at_once
        self._recipe, self._after_step = recipe or Recipe(), after_step
        self._named = dict(model.named_parameters())
        guessed = lesson.patterned | (masked_weights(model) if masks is None else frozenset())
        known = {name: alive for name, alive in (masks or {}).items() if name in self._named}  # absent blocks have none
        self._held: Masks = {n: p.detach() != 0 for n, p in self._named.items() if n in guessed} | known
        self._masking: Masking | None = None
        recipe = self._recipe
        self._optimizer = recipe.optimizer.build(model, bool(batch_norms(model)), recipe.learning_rate)
        self._schedule = recipe.schedule.build(self._optimizer, steps)
        self._average = None if recipe.ema is None else Average(model, recipe.ema)
        self._eight_bits = EightBits(model)
        self._source: Iterator[Step] | None = None
        self._chance: list[Tensor] = []  # states of the generators that dropout draws from; none before the first step

    def follow(self, masking: Masking) -> None:
        """Ask `masking` for masks at every step, before the optimizer takes it; what it has learned of others goes."""
        self._masking = masking

    @one_thread()
    def advance(self, steps: int) -> int:
        """Train for the next `steps` of the course; returns the samples seen.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        model, stop, seen = self._model, min(self.done + steps, self._steps), 0
        if self._source is None:
            self._source = self._lesson.material.steps(self.done, self._steps, self._seed, self._at_once)
        model.train().requires_grad_(True)
        for norm in () if self._recipe.running else batch_norms(model).values():
            norm.eval()
        precise = computing(model, self._lesson.precision)
        own = nullcontext() if self._average is None else self._average.training()
        try:
            with self._eight_bits.within(), own, torch.enable_grad(), precise, torch.random.fork_rng(devices=[]):
                self._seed_chance()
                for samples, portions in islice(self._source, stop - self.done):
                    self._step(portions)
                    seen += samples
                self._chance = _chance(self._lesson.material.device)
        finally:
            self.seen += seen
            model.zero_grad(set_to_none=True)
            model.eval()
        return seen

    def __iter__(self) -> Iterator[Progress]:
        """Train to the end, with a word after every step."""
        return self.run(range(self.done + 1, self._steps + 1))

    def run(self, stops: Iterable[int]) -> Iterator[Progress]:
        """Train to the end, with a word at each of `stops`."""
        for stop in stops:
            self.advance(stop - self.done)
            yield Progress(self.done, self.loss, self.seen)

    def state_dict(self) -> dict[str, Any]:
        """All but the weights that the model holds: plain values and tensors, for `torch.load(weights_only=True)`."""
        return {
            "done": self.done,
            "seen": self.seen,
            "loss": self.loss,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "exact": self._eight_bits.state(),
            "held": dict(self._held),
            "epoch": self._lesson.material.begun.get(self._seed),
            "chance": self._chance,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the course of `state` stood; the model must have its weights of then."""
        self.done, self._chance, self._source = int(state["done"]), list(state["chance"]), None
        self._optimizer.load_state_dict(state["optimizer"])
        self.seen, self.loss = state.get("seen", 0), state.get("loss", math.nan)  # version 0.1.0 did not keep them
        if "schedule" in state:
            self._schedule.load_state_dict(state["schedule"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        if "exact" in state:
            self._eight_bits.load_state(state["exact"])
        if "held" in state:  # version 0.1.0 read them from the weights alone
            self._held = {name: alive.to(self._named[name].device) for name, alive in state["held"].items()}
        if state.get("epoch") is not None:
            epoch, first = state["epoch"]
            self._lesson.material.begun[self._seed] = epoch, first

    def _step(self, portions: Iterable[Portion]) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss = _backward(self._model, self._lesson, portions, self._recipe)
        if not math.isfinite(loss):
            raise ArithmeticError(f"the fine-tuning loss is {loss} at step {self.done}")
        self.loss = loss
        with self._eight_bits.exact():
            self._mask_gradients()
            if self._recipe.max_norm is not None:
                nn.utils.clip_grad_norm_(self._model.parameters(), self._recipe.max_norm)
            self._schedule.before(self.done)
            self._optimizer.step()
            with torch.no_grad():
                for name, alive in self._held.items():
                    self._named[name].masked_fill_(~alive, 0.0)  # by a product some would be -0
        if self._after_step is not None:
            self._after_step(self._optimizer.param_groups[0]["lr"])
        self._schedule.after()
        if self._average is not None:
            self._average.update()
        self.done += 1

    @torch.no_grad()
    def _mask_gradients(self) -> None:
        """What is zero and stays so has no gradient; where the masks change, no momentum and no average either."""
        found = None if self._masking is None else self._masking(self.done, self._named, self._held)
        for name, alive in ({} if found is None else found).items():
            parameter = self._named[name]
            parameter.masked_fill_(~alive, 0.0)
            for value in self._optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.mul_(alive)
        if found is not None:
            self._held = {**self._held, **found}
            if self._average is not None:
                self._average.mask(found)
        for name, alive in self._held.items():
            if (gradient := self._named[name].grad) is not None:
                gradient.mul_(alive)

    def _seed_chance(self) -> None:
        """Dropout draws from the global generators: from the seed, or on from where they stood."""
        if not self._chance:
            torch.manual_seed(self._seed)
            return
        torch.set_rng_state(self._chance[0])
        if len(self._chance) > 1:
            torch.cuda.set_rng_state(self._chance[1], self._lesson.material.device)


def _backward(model: nn.Module, lesson: Lesson, portions: Iterable[Portion], recipe: Recipe) -> float:
    """Gradients of the samples of a step; returns their loss."""
    total = 0.0
    for portion in portions:
        with SoundGradients(), Folded(model, lesson.sites):
            loss = _loss(model, lesson, portion, recipe) * portion.share
        loss.backward()
        total += loss.item()
    return total


def _loss(model: nn.Module, lesson: Lesson, portion: Portion, recipe: Recipe) -> Tensor:
    """Mean of w * fidelity + (1 - w) * the task's loss + the features'; what has no weight costs no forward pass."""
    distillation, terms = recipe.distillation, list[Tensor]()
    if distillation > 0.0 or lesson.features is not None:
        with noted(model, () if lesson.features is None else lesson.features.names) as seen:
            outputs = lesson.outputs(model, portion.batch)
        if distillation > 0.0:
            faithful = lesson.fidelity(outputs, portion.teacher).mean()
            terms.append(faithful if distillation == 1.0 else distillation * faithful)
        if lesson.features is not None:
            terms.append(recipe.feature_weight * feature_loss(seen(), portion.features, portion.batch))
    if distillation < 1.0:
        if lesson.task_loss is None:
            raise InputError(f"a distillation weight of {distillation} needs the task's own loss")
        terms.append((1.0 - distillation) * lesson.task_loss(model, portion.batch))
    return sum(terms[1:], terms[0])


def usual_rate(convolutional: bool) -> float:
    """The peak learning rate where a recipe names none: of SGD for models with batch norms, of AdamW for others."""
    return OptimizerChoice().usual_rate(convolutional)


def _chance(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
