"""The seams of the house: what a user or a plug-in has to offer. Torch appears as a type only."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast, get_args, runtime_checkable

import numpy as np
import numpy.typing as npt

from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.policy import IntArray, Policy
from autoprune.structure import Group, Structure

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = Any
"""Any tree of tensors whose dimension 0 is the sample; `database/rows.py` says what else goes."""

T = TypeVar("T")
FloatArray = npt.NDArray[np.float64]
Direction = Literal["maximize", "minimize"]
FitnessTier = Literal["stitch", "refit", "tune"]
SPLITS = ("calibration", "validation", "test", "train")


def check_directions(directions: Mapping[str, object]) -> Mapping[str, Direction]:
    """The directions of a task's metrics; InputError for one that is none."""
    for name, way in directions.items():
        if way not in get_args(Direction):
            raise InputError(f"directions: {name!r} is {way!r}; allowed: {', '.join(get_args(Direction))}")
    return cast("Mapping[str, Direction]", directions)


@runtime_checkable
class Task(Protocol):
    """The user's model, data and metric.

    It may have more: `classes`, the axis of the outputs along which classes lie (by default 1 for [N, C, spatial...],
    -1 else). `outputs` may also be no method but a key, as "logits", or an index: which of what the model returns for
    the inputs of a pair must stay faithful. `auto_loss` names the loss that `objectives.loss: auto` takes, where shapes
    and targets do not tell it: cosine for embeddings.
    """

    @property
    def directions(self) -> Mapping[str, Direction]:
        """Which way each metric of `metrics` is better."""

    def build(self) -> nn.Module:
        """A fresh model with the dense weights."""

    def example_inputs(self) -> tuple[Any, ...]:
        """Arguments of the model, a batch of at least 2; a dict alone is passed as keywords where it can be."""

    def split(self, name: str) -> Iterable[Batch]:
        """Batches of `calibration`, `validation`, `test` or `train`.

        The same ones in the same order at every call, but for `train`, which may shuffle and augment. What is returned
        may have `stored()`, the batches in the type in which they should be kept (bytes), and `ready`, a picklable
        function that makes one of those what the split yields; and `samples`, how many there are.
        """

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What must stay faithful: logits for kl, any tensor for mse or cosine.

        Of a dict, tuple or object that it returns `logits` counts, else the first floating tensor.
        """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scalar training loss, for gradients and fine-tuning."""

    def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        """Metrics over all `batches`; model in eval mode."""


class Criterion(Protocol):
    """Scores the atoms of every group once; built as C(**options); the model is left untouched.

    One that says `weights_only = True` asks nothing of its task, so that a model is ranked where there are no data.
    """

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        """Group name -> finite scores [width]; higher is kept longer. Data comes from the calibration split.

        Blocks are not among the groups: their score is what they add to their stream.
        """


@runtime_checkable
class GramCriterion(Protocol):
    """A criterion that works on the Grams which the level database collects anyway, so that they are collected once."""

    def from_consumers(self, group: Group, consumers: Sequence[Any]) -> Tensor:
        """Scores [width] of one group from its `database.consumers.Consumer`s."""


@runtime_checkable
class WeightCriterion(Protocol):
    """A criterion that scores single weights as well, so that a mask can be made of them.

    The level database makes the masks of a criterion without this method from its Grams (`obs`: SparseGPT), or refuses
    it for groups of kind `weight`.
    """

    def weights(self, model: nn.Module, names: Sequence[str], task: Task) -> Mapping[str, Tensor]:
        """Finite scores in the shape of each of the parameters `names` of `model`, which is left untouched.

        Higher is kept longer; those of different weights compare, so that one threshold can cut all of them. Data come
        from the calibration split.
        """


class Loss(Protocol):
    """How far outputs are from the dense ones: a function of its file's name in autoprune/losses, or a user's own."""

    def __call__(self, outputs: Tensor, dense_outputs: Tensor, /, *, classes: int) -> Tensor:
        """One value a sample [samples], 0 for equal outputs; `classes` is the axis along which classes lie."""


@dataclass(frozen=True)
class Progress:
    """How far a training is: steps done, the loss of the last one, samples seen in all."""

    step: int
    loss: float
    samples: int


@dataclass(frozen=True)
class Step:
    """How far a stage of the preparation is: `done` of `total`, in whatever the stage counts its work by.

    `unit` is what the figures count, where a reader can count it too ("batches"); else they are shown as a share.
    `ahead_s` is about what comes after this stage, as far as somebody knows.
    """

    stage: str
    done: float = 0.0
    total: float = 1.0
    unit: str = ""
    ahead_s: float | None = None


def finished(steps: Generator[Any, None, T]) -> T:
    """What a generator returns, its steps passed over."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            value: T = end.value
            return value


def relayed(steps: Generator[Step, None, T], each: Callable[[Step], Step]) -> Generator[Step, None, T]:
    """The same steps as `each` gives them, and what comes of them."""
    with closing(steps):
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                value: T = end.value
                return value
            yield each(step)


class Recovery(Protocol):
    """A way to train a pruned model back, built as R(**options).

    The model is trained in place, from its weights on; between two steps it is in eval mode, so that the caller can
    score it, who keeps the best weights. Everything that is drawn follows from `seed`, and global chance stays. One
    whose parameter is called `course` is given all options of a course that are not its own, as a
    `autoprune.recovery.Distilled`, and keeps it under that name: the caller puts the peak rate that it has found there,
    and learns when to score and when to stop. It may have `check(dense)` and `check_policy(structure, policy)`, which
    raise an InputError before any work. A training whose `ready` is False is not scored: the model is not yet that of
    the point.
    """

    def __call__(self, model: nn.Module, dense: nn.Module, task: Task, steps: int, seed: int) -> Iterable[Progress]:
        """Train for `steps` optimizer steps; `dense` may teach. The last Progress is that of the last step.

        What is returned may be `Resumable` too.
        """


@runtime_checkable
class Resumable(Protocol):
    """A training that can be stopped between two steps, kept, and gone on with elsewhere as if nothing had been."""

    def state_dict(self) -> Mapping[str, Any]:
        """All but the weights that the model holds: tensors and plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where that of `state` stood, before the first step; the model has its weights of then."""


@runtime_checkable
class PathRecovery(Protocol):
    """A recovery that cuts by and by: each policy of its path is cut to, repaired and trained, the next from there."""

    def path(self, structure: Structure, policy: Policy) -> Sequence[Policy]:
        """The policies on the way, each within the one before; the last one is `policy`."""


@runtime_checkable
class SparseRecovery(Protocol):
    """A recovery that trains the dense model for a `share` of the steps before anything is cut."""

    share: float

    def before(
        self, model: nn.Module, dense: nn.Module, groups: Sequence[Group], task: Task, steps: int, seed: int
    ) -> Iterable[Progress]:
        """Train `model`, a copy of the dense one, in place, so that atoms of `groups` can go; `dense` may teach.

        What is returned may be `Resumable` too.
        """


@runtime_checkable
class RewoundRecovery(Protocol):
    """A recovery whose pruned model starts from other weights than those that it was cut with."""

    def start(self, model: nn.Module) -> None:
        """Give a copy of the dense model these weights, in place."""


@runtime_checkable
class ThinningRecovery(Protocol):
    """A recovery that finds anew which weights of each matrix stay: as many as the pruned model has."""

    def thin(
        self, model: nn.Module, whole: nn.Module, dense: nn.Module, task: Task, steps: int, seed: int
    ) -> Iterable[Progress]:
        """Train `model` in place, as it is called otherwise; `whole` is it before any weight of a matrix went.

        That is repaired, or has the weights of `start`. What is returned may be `Resumable` too.
        """


class Container(Protocol):
    """What a deployment format can hold.

    One that is picky about the model itself has `check(model)`, which raises InputError before anything is computed.
    One that is written has `write(model, structure, policy, folder)`, which leaves the pruned model in a folder that
    holds its tokenizer already, and `read_back(folder, model, inputs)`, which raises RunError where that is not what
    the model is; without it transformers reads the folder. `together(structure, policy)` names groups whose widths fit
    for what others have, though not each by itself.
    """

    def restrict(self, structure: Structure) -> Structure:
        """The groups and grids that it can hold; what it cannot goes to `frozen`, with the reason."""


class Cost(Protocol):
    """A cost of widths, as a ratio to the dense model; built as C(structure).

    `dense` is the dense model's cost in the cost's own unit. `monotone`: it never falls where a group gets wider, so
    that a budget may be bisected for; any other cost filters what is proposed.
    """

    monotone: bool
    dense: float

    def __call__(self, widths: IntArray) -> FloatArray:
        """Widths [..., groups] in the order of `structure.groups` -> ratio [...]; 1 at the dense widths."""


@dataclass(frozen=True)
class Budget:
    """The range [low, high] of the first cost that the front should cover; where finalists are tuned; hard limits.

    `limits` are upper bounds on further costs, as ratios to dense.
    """

    cost: str
    low: float
    high: float
    at: tuple[float, ...]
    limits: Mapping[str, float]


@dataclass(frozen=True)
class Problem:
    """All that a searcher may know: widths and numbers, no model.

    `objectives` are the names of the costs beside the loss; `tier` is the fitness tier to ask at; `table` is the
    sensitivity table, {group: {width: loss of the model with that group alone narrowed}}, at `tier` or `refit`; `seeds`
    are evaluations that exist before the first ask; `n_trials` is the ledger in full evaluations; `logarithmic` losses
    compare by their ratios (a fidelity's), others (a task's own metric) by their differences.
    """

    structure: Structure
    scores: Mapping[str, FloatArray]
    costs: Mapping[str, Cost]
    budget: Budget
    objectives: tuple[str, ...] = ("macs",)
    n_trials: int = 300
    tier: FitnessTier = "refit"
    table: Mapping[str, Mapping[int, float]] | None = None
    seeds: tuple[Evaluation, ...] = ()
    logarithmic: bool = True


class Sampler(Protocol):
    """Built as S(problem, rng, **options). The k-th tell answers the k-th ask; failed evaluations are told too.

    What it works from stands in attributes of its class, each False where it says nothing: `uses_table` (the
    sensitivity table, `problem.table`, which costs evaluations), `uses_seeds` (`problem.seeds`: evaluated control
    arms), `one_objective` (it minimises the loss at the budget's cost, and is refused for several costs). Where options
    decide it, a static method `uses(options)` gives (table, seeds) instead.
    """

    def ask(self) -> Ask: ...

    def tell(self, evaluation: Evaluation) -> None: ...


@dataclass(frozen=True)
class WorkerState:
    """How a worker of an executor is doing: `done` answers so far in `busy_s` seconds of work."""

    name: str
    state: Literal["starting", "idle", "busy"]
    done: int
    busy_s: float
    node: str = ""


class Executor(Protocol):
    """Runs asks somewhere. Built as E(make_evaluator, workers, timeout_s, retries, **options); results in any order.

    An ask whose worker is lost, or over which the evaluator raises, is tried again a bounded number of times. Where an
    executor has a static `each(function, items, **options)` beside this, that calls `function` with every item on its
    machines, for work that is no ask: items are (number, item), it gives (number, result) as they come.
    """

    slots: int

    def submit(self, index: int, ask: Ask) -> None: ...

    def next_done(self, timeout: float | None = None) -> tuple[int, Evaluation] | None:
        """The next finished (index, evaluation), or None after `timeout` seconds without one."""

    def cancel(self, index: int) -> None: ...

    def close(self) -> None: ...

    def workers(self) -> Sequence[WorkerState]:
        """How each worker is doing, for progress views."""

    @property
    def retried(self) -> int:
        """Asks that had to be tried again so far."""


class Export(Protocol):
    """Writes a model as one format; a class without arguments. `packages`, where it has any, must be installed."""

    suffix: str
    """The file, or folder, is model.SUFFIX."""

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], path: Path) -> Any:
        """Write `path`, and return what the written file computes for `inputs`; None where nothing here can run it.

        The caller compares it with the model's own outputs. Whatever else is written beside `path` goes along with it.
        """


class Runtime(Protocol):
    """What latency is measured on: a function, or a class without arguments.

    One instance meets one model and then slim copies of it, so that what it learns of the first may help with the
    others. Optional: `device` ("cpu") where it runs on one kind only, else it runs where the model lies; `packages`
    that must be installed, and the `extra` that brings them; `operation(module, x, threads)` where single operations
    are loaded in a quicker way (without it they run eagerly); `step`, the channels in which the time of a convolution
    grows on this machine: a search for latency then leaves the widths between out (`space.multiple_of: auto`).
    """

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], threads: int) -> Callable[[], object]:
        """What runs `model` once on `inputs` and returns when that is done."""


Strategy = Callable[[Problem, float], Policy]
"""(problem, target) -> policy whose budget cost is at most `target`; closed form, no evaluation.

What it works from stands in attributes of the function: `kinds`, the kinds of groups that it takes (all where it says
nothing; others are refused in one line), and `uses_table`, whether it reads the sensitivity table.
"""

Evaluator = Callable[[Ask], Evaluation]
EvaluatorFactory = Callable[[], Evaluator]
"""Picklable; called once in every worker."""
