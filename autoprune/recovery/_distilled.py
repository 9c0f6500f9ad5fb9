"""A course of distillation from the dense model, as a recovery's options describe it: what all of them train by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from autoprune import plugins
from autoprune.database.batches import drawing
from autoprune.database.drawn import draw
from autoprune.database.zeros import masked_weights, patterned_weights
from autoprune.errors import InputError, did_you_mean
from autoprune.evaluator.features import Features
from autoprune.evaluator.fidelity import AUTO, fidelity_for
from autoprune.evaluator.finetune import MAX_NORM, Course, Lesson, Masks, Recipe
from autoprune.evaluator.keep_best import CHECKS
from autoprune.evaluator.material import BATCH_SIZE, Reading, material_for
from autoprune.evaluator.optimizers import OptimizerChoice
from autoprune.evaluator.precision import Wanted
from autoprune.evaluator.prepared import LOOKED_AT, course_precision, fast_format
from autoprune.evaluator.schedules import ScheduleChoice
from autoprune.protocols import Task
from autoprune.tracing.one_thread import one_thread
from autoprune.tracing.outputs import faithful
from autoprune.tracing.wiring import batch_norms, find_sites

AT_ONCE = 256
"""Samples that the dense model sees at a time."""
WHERE = "recovery.options"
PLACE = "in the job file: recovery: {options: {...}}"
"""Where options go, for who is told that one is missing."""


@dataclass(frozen=True)
class _Range:
    """Which numbers an option may be, in words that follow "must"."""

    words: str
    holds: Callable[[float], bool]
    whole: bool = False

    def takes(self, value: object) -> bool:
        """Whether it is one of them."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return math.isfinite(value) and self.holds(value)


COUNT = _Range("be a whole number from 1 on", lambda v: v >= 1, whole=True)
RANGES: Mapping[str, _Range] = {
    "learning_rate": _Range("lie in (0, 10]", lambda v: 0.0 < v <= 10.0),
    "distillation": _Range("lie in [0, 1]", lambda v: 0.0 <= v <= 1.0),
    "weight_decay": _Range("be a number from 0 on", lambda v: v >= 0.0),
    "warmup": _Range("be a share below 1, or a whole number of steps", lambda v: 0.0 <= v < 1.0 or v == int(v) > 0),
    "epochs": _Range("be a number of epochs from 0 to 10000", lambda v: 0.0 <= v <= 1e4),
    "max_norm": _Range("be above 0, or null for no clipping", lambda v: v > 0.0),
    "ema": _Range("lie in (0, 1), as 0.999", lambda v: 0.0 < v < 1.0),
    "feature_weight": _Range("be above 0", lambda v: v > 0.0),
    **dict.fromkeys(("batch_size", "accumulate", "scorings", "patience", "checkpoint_every"), COUNT),
}
OPTIONAL = ("learning_rate", "weight_decay", "warmup", "epochs", "max_norm", "ema", "patience", "checkpoint_every")


class _LastLesson:
    """The lesson that was made last, for who asks for it again: the probes of a rate and the training that follows."""

    def __init__(self) -> None:
        self._of: tuple[nn.Module, Task, int, int] | None = None
        self._lesson: Lesson | None = None

    def get(self, dense: nn.Module, task: Task, steps: int, seed: int, make: Callable[[], Lesson]) -> Lesson:
        """The lesson of this very model and task."""
        known = self._of is not None and self._of[0] is dense and self._of[1] is task and self._of[2:] == (steps, seed)
        if self._lesson is None or not known:
            self._of, self._lesson = None, None  # lest two of them lie in memory
            self._lesson = make()
            self._of = dense, task, steps, seed
        return self._lesson


@dataclass(frozen=True)
class Masked:
    """What a point says of a weight: `mask`, bool like it, where it has numbers; `pattern` is "n:m", or "" for none."""

    mask: Tensor
    pattern: str = ""


@dataclass(frozen=True)
class Distilled:
    """What a recovery's options say of its courses. docs/production.md has them in a table.

    `learning_rate` is the peak (None: whoever trains finds it by probes), `distillation` its share of the loss, the
    task's own has the rest; `loss` is the one between outputs, a file of autoprune/losses or "module:attribute".
    `optimizer` and `scheduler` are names or "module:factory" (`OptimizerChoice`, `ScheduleChoice`). A step takes
    `accumulate` batches of `batch_size`. `features` are globs over names of modules whose outputs are taught too. The
    train split is read anew at every epoch, and the dense model asked for each batch, where it gives others each time
    or is large; `fresh` says that it must be. Batch norms keep what the repair gave them, with `norm_statistics:
    running` they go by each batch and gather anew. The caller scores `scorings` times, stops after `patience` of them
    without a better one, and keeps the course at each, and every `checkpoint_every` steps. `point` is no option: who
    cuts the model puts there which of its weights have masks; None: the zeros of the model say so.

    Raises:
        InputError: an option is out of its range, or names what there is not.
    """

    learning_rate: float | None = None
    distillation: float = 1.0
    loss: str = AUTO
    optimizer: str | None = None
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    weight_decay: float | None = None
    scheduler: str = "cosine"
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    warmup: float | None = None
    epochs: float | None = None
    batch_size: int = BATCH_SIZE
    accumulate: int = 1
    max_norm: float | None = MAX_NORM
    precision: Wanted = "fp32"
    ema: float | None = None
    features: Sequence[str] = ()
    feature_weight: float = 1.0
    fresh: bool = False
    norm_statistics: Literal["fixed", "running"] = "fixed"
    scorings: int = CHECKS
    patience: int | None = None
    checkpoint_every: int | None = None
    point: Mapping[str, Masked] | None = field(default=None, repr=False, compare=False)
    last_lesson: _LastLesson = field(default_factory=_LastLesson, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if not (value is None and name in OPTIONAL) and not allowed.takes(value):
                raise InputError(f"{WHERE}: {name} must {allowed.words}, not {value!r}")
        self._check_words()
        with _in_options():
            self._recipe()
            if self.loss != AUTO:
                plugins.load("losses", self.loss)

    def _check_words(self) -> None:
        """What is no number."""
        for name, words in (("precision", get_args(Wanted)), ("norm_statistics", ("fixed", "running"))):
            if getattr(self, name) not in words:
                hint = did_you_mean(str(getattr(self, name)), words)
                raise InputError(f"{WHERE}: unknown {name} {getattr(self, name)!r}; {hint}")
        for name in ("optimizer_options", "scheduler_options"):
            if not isinstance(getattr(self, name), Mapping):
                raise InputError(f"{WHERE}: {name} must be a mapping of options, not {getattr(self, name)!r}")
        for name, kinds in (("loss", str), ("optimizer", str | None), ("scheduler", str), ("fresh", bool)):
            if not isinstance(getattr(self, name), kinds):
                what = "true or false" if name == "fresh" else "a name, or module:attribute"
                raise InputError(f"{WHERE}: {name} must be {what}, not {getattr(self, name)!r}")
        globs = self.features if isinstance(self.features, list | tuple) else [None]
        if not all(isinstance(glob, str) for glob in globs):
            raise InputError(f"{WHERE}: features must be a list of names of modules, not {self.features!r}")

    @property
    def samples_a_step(self) -> int:
        """Samples that a step of the optimizer learns from."""
        return self.batch_size * self.accumulate

    def usual_rate(self, model: nn.Module) -> float:
        """The peak rate around which the best one is looked for."""
        return OptimizerChoice(self.optimizer).usual_rate(bool(batch_norms(model)))

    def course(
        self,
        model: nn.Module,
        dense: nn.Module,
        task: Task,
        steps: int,
        seed: int,
        after_step: Callable[[float], None] | None = None,
    ) -> Course:
        """A training of `model`, in place; `after_step` is told the learning rate of each step.

        Raises:
            InputError: the model has not the modules of `features` as the dense one has them, or the optimizer refuses
                its parameters.
        """
        lesson = self.lesson(dense, task, steps, seed)
        masks = self.masks_for(model, dense)
        lesson = replace(lesson, patterned=(lesson.patterned | masked_weights(model, dense)) - masks.keys())
        return self._begun(model, lesson, steps, seed, after_step, masks)

    def masks_for(self, model: nn.Module, dense: nn.Module) -> dict[str, Tensor]:
        """The masks of the point for the weights of `model`; without the zeros of a pattern that `dense` brings."""
        held, own = dict(model.named_parameters()), patterned_weights(dense)
        known = {name: of.mask.to(held[name].device) for name, of in (self.point or {}).items() if name in held}
        return {name: mask & (held[name].detach() != 0) if name in own else mask for name, mask in known.items()}

    def probe(self, model: nn.Module, lesson: Lesson, seed: int, rate: float, steps: int) -> None:
        """A course as short as `steps` at a peak rate, to its end: a whole cosine, of which no average is taken.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        short = replace(self, learning_rate=rate, ema=None, scheduler="cosine", scheduler_options={}, warmup=None)
        short._begun(model, lesson, steps, seed).advance(steps)

    def lesson(self, dense: nn.Module, task: Task, steps: int, seed: int) -> Lesson:
        """What a course of `steps` learns from; the last one is kept."""
        return self.last_lesson.get(dense, task, steps, seed, partial(self._lesson, dense, task, steps, seed))

    def check(self, dense: nn.Module, small: nn.Module, task: Task) -> None:
        """Look at what can be known before any work of a model that is cut as `small` is.

        Raises:
            InputError: it has not the modules of `features` as `dense` has them, or its parameters are refused.
        """
        with _in_options():
            recipe = self._recipe()
            recipe.schedule.build(recipe.optimizer.build(small, bool(batch_norms(small)), self.learning_rate), 10)
            if self.features:
                Features.of(self.features, dense, task.example_inputs()).check(small)

    def _recipe(self) -> Recipe:
        return Recipe(
            self.learning_rate,
            self.distillation,
            OptimizerChoice(self.optimizer, self.optimizer_options, self.weight_decay),
            ScheduleChoice(self.scheduler, self.scheduler_options, self.warmup),
            self.max_norm,
            self.ema,
            self.feature_weight,
            self._running,
        )

    @property
    def _running(self) -> bool:
        return self.norm_statistics == "running"

    def _begun(
        self,
        model: nn.Module,
        lesson: Lesson,
        steps: int,
        seed: int,
        after_step: Callable[[float], None] | None = None,
        masks: Masks | None = None,
    ) -> Course:
        with _in_options():
            if lesson.features is not None:
                lesson.features.check(model)
            return Course(model, lesson, steps, seed, self.batch_size, self._recipe(), after_step, masks)

    @one_thread()
    def _lesson(self, dense: nn.Module, task: Task, steps: int, seed: int) -> Lesson:
        device = next((p.device for p in dense.parameters()), torch.device("cpu"))
        layout = fast_format(task, dense)
        with drawing(seed):
            batch = draw(task.split("train"), LOOKED_AT).on(device, layout)[0]
        measure = fidelity_for(task, dense, batch, self.loss)
        precision = course_precision(self.precision, task, dense, batch, measure)
        with _in_options():
            features = Features.of(self.features, dense, task.example_inputs()) if self.features else None
        reading = Reading(
            self.samples_a_step, AT_ONCE, precision, self.fresh, () if features is None else features.names
        )
        return Lesson(
            material_for(task, dense, steps, seed, layout, reading),
            partial(faithful, task),
            measure,
            {} if features is not None or self._running else find_sites(dense, task.example_inputs()),
            precision,
            task.loss,
            patterned_weights(dense),
            features,
        )


@contextmanager
def _in_options() -> Iterator[None]:
    """What is wrong with an option says where it stands."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{WHERE}: {error}") from error
