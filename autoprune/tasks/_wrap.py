"""A user's model without a class: `autoprune.task(model, loaders, loss_fn, metric_fn)` makes a Task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autoprune.database.batches import drawing, gather, size
from autoprune.database.rows import as_tensors, is_listed, tensors_of
from autoprune.errors import InputError, did_you_mean, one_line
from autoprune.protocols import SPLITS, Batch, Direction, check_directions
from autoprune.tasks._trees import RaggedError, cat_trees
from autoprune.tracing.copies import private_copy
from autoprune.tracing.eval_mode import evaluating
from autoprune.tracing.inputs import arguments, call_model
from autoprune.tracing.outputs import Wanted, pick_output, said_output

TARGETS = ("labels", "label", "targets", "target")
"""The key of a dict batch that holds what the loss and the metric compare with."""
LossFn = Callable[[Any, Any], Tensor]
MetricFn = Callable[[Any, Any], Mapping[str, float]]


def task(
    model: nn.Module,
    loaders: Mapping[str, Iterable[Any]],
    loss_fn: LossFn,
    metric_fn: MetricFn,
    directions: Mapping[str, Direction] | None = None,
    *,
    outputs: Wanted = None,
    classes: int | None = None,
) -> WrappedTask:
    """A Task from a trained model and loaders of (inputs, targets) pairs for each of the four splits.

    A batch may also be one dict: `labels`, `label`, `targets` or `target` in it are the targets, the rest the inputs.
    `inputs` are what the model is called with: a tensor, a tuple of them, or a dict (keywords where `forward` has
    parameters of these names, else one argument); a list is several arguments where `forward` takes as many, else one.
    numpy arrays become tensors. `loss_fn(outputs, targets)` returns a scalar for training, `metric_fn` of the same
    floats over a whole split; both see all that the model returns. Metrics are maximised unless `directions` says
    "minimize". `outputs` is a key, an index or a function of what the model returns and says which tensor must stay
    faithful (by default `logits`, else the first floating one), `classes` the axis of its classes.

    Raises:
        InputError: a split is missing, cannot be read twice, or shuffles where the order must stay; the model, the
            loss or the metric fails on the first batch.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, not a {type(model).__name__}")
    if classes is not None and (not isinstance(classes, int) or isinstance(classes, bool)):
        raise InputError(f"classes must be the number of an axis of the outputs, as in 1 or -1, not {classes!r}")
    _check_splits(loaders)
    first = {name: _first_batch(name, loaders[name]) for name in SPLITS}
    spread, seen = _spreads(model, first["calibration"]), first["validation"]
    with evaluating(model):
        returned = _called_first(model, seen, spread)
        pick_output(returned, outputs)
        _check_loss(loss_fn, returned, seen[1])
        try:
            names = measured(metric_fn, [(returned, seen[1], size(seen))])
        except (RuntimeError, ArithmeticError) as error:
            raise InputError(f"metric_fn fails on the first validation batch: {one_line(error)}") from error
    for name in directions or {}:
        if name not in names:
            raise InputError(f"directions: metric_fn returns no {name!r}; {did_you_mean(name, names)}")
    said = check_directions(directions or {})
    chosen: dict[str, Direction] = {name: said.get(name, "maximize") for name in names}
    output = Output(outputs, classes, said_output(returned, outputs), _alike(first))
    return WrappedTask(model, loaders, loss_fn, metric_fn, chosen, output, spread)


@dataclass(frozen=True)
class Output:
    """Which output of a model counts, the axis of its classes, which one it is in words; what to say of its samples."""

    wanted: Wanted = None
    classes: int | None = None
    said: str = ""
    samples_said: tuple[str, ...] = ()


class WrappedTask:
    """The Task that `autoprune.task` makes; `spread` says that a list of inputs is several arguments."""

    def __init__(
        self,
        model: nn.Module,
        loaders: Mapping[str, Iterable[Any]],
        loss_fn: LossFn,
        metric_fn: MetricFn,
        directions: Mapping[str, Direction],
        output: Output,
        spread: bool,
    ) -> None:
        self._model, self._loaders, self._loss_fn, self._metric_fn = model, dict(loaders), loss_fn, metric_fn
        self._directions, self._output, self._spread = directions, output, spread

    @property
    def directions(self) -> Mapping[str, Direction]:
        return MappingProxyType(dict(self._directions))

    @property
    def classes(self) -> int | None:
        """The axis of the outputs along which classes lie, where it was stated."""
        return self._output.classes

    @property
    def samples_said(self) -> tuple[str, ...]:
        """What a user ought to know of the splits."""
        return self._output.samples_said

    @property
    def output_said(self) -> str:
        """Which output of the model counts, in words; empty where there is one only."""
        return self._output.said

    def build(self) -> nn.Module:
        return private_copy(self._model)

    def example_inputs(self) -> tuple[Any, ...]:
        """Inputs of the first two calibration samples, or of the first batch where it is one piece."""
        inputs = gather(self.split("calibration"), 2)[0][0]
        return tuple(tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, arguments_of(inputs)))

    def split(self, name: str) -> Iterable[Batch]:
        if name not in self._loaders:
            raise InputError(f"unknown split {name!r}; {did_you_mean(name, SPLITS)}")
        loader = self._loaders[name]
        return loader if hasattr(loader, "stored") else Pairs(loader, self._spread)  # pairs of tensors already

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return pick_output(call_model(model, arguments_of(batch[0])), self._output.wanted)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._loss_fn(call_model(model, arguments_of(batch[0])), batch[1])

    def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        seen = []
        with evaluating(model):
            for batch in batches:
                seen.append((call_model(model, arguments_of(batch[0])), batch[1], size(batch)))
            return measured(self._metric_fn, seen)


@dataclass(frozen=True)
class Pairs:
    """A loader's batches as (inputs, targets) of tensors, at every pass anew."""

    loader: Iterable[Any]
    spread: bool

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            inputs, targets = pair_of(batch)
            given = as_tensors(inputs)
            yield (tuple(given) if self.spread and isinstance(given, list) else given), as_tensors(targets)


def pair_of(batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of what a loader yields: a pair, or a dict in which the targets have one of their names.

    Raises:
        InputError: it is neither.
    """
    if isinstance(batch, Mapping):
        held = [key for key in TARGETS if key in batch]
        inputs = {key: value for key, value in batch.items() if key not in held}
        if len(held) == 1 and inputs:
            return inputs, batch[held[0]]
        shown = f"a dict of {', '.join(map(repr, batch))}"
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    else:
        shown = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
    raise InputError(
        f"a batch must be an (inputs, targets) pair, or a dict of the inputs with the targets under one of "
        f"{', '.join(TARGETS)}, not {shown}"
    )


def arguments_of(inputs: Any) -> tuple[Any, ...]:
    """What a model is called with: a tuple holds several arguments, anything else is one."""
    return inputs if type(inputs) is tuple else (inputs,)


def measured(metric_fn: MetricFn, seen: Sequence[tuple[Any, Any, int]]) -> dict[str, float]:
    """Metrics of (outputs, targets, samples) batches together; where these cannot be joined, the mean over batches.

    Raises:
        InputError: the function returns no mapping of names to numbers.
        RuntimeError: it fails.
    """
    try:
        whole = (cat_trees([o for o, _, _ in seen]), cat_trees([t for _, t, _ in seen]))
    except RaggedError:
        rows = [(_called(metric_fn, outputs, targets), n) for outputs, targets, n in seen]
        total = sum(n for _, n in rows)
        return {name: sum(row[name] * n for row, n in rows) / total for name in rows[0][0]}
    return _called(metric_fn, *whole)


def _called(metric_fn: MetricFn, outputs: Any, targets: Any) -> dict[str, float]:
    try:
        found = metric_fn(outputs, targets)
    except (RuntimeError, ArithmeticError):
        raise
    except Exception as error:  # a user's function may fail in any way; for one candidate that is no end
        raise RuntimeError(f"metric_fn failed: {one_line(error)}") from error
    if not isinstance(found, Mapping):
        raise InputError(f"metric_fn must return a mapping of names to floats, not a {type(found).__name__}")
    return {str(name): _number(name, value) for name, value in found.items()}


def _number(name: object, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        shape = f" {list(value.shape)}" if hasattr(value, "shape") else ""
        what = f"{type(value).__name__}{shape}"
        raise InputError(f"metric_fn must return one number for {name!r}, not a {what}; take its mean") from error


def _check_splits(loaders: Any) -> None:
    """All four, by their names."""
    if not isinstance(loaders, Mapping):
        raise InputError(f"loaders must map {', '.join(SPLITS)} to loaders each, not be a {type(loaders).__name__}")
    for name in loaders:
        if name not in SPLITS:
            raise InputError(f"unknown split {name!r} in loaders; {did_you_mean(name, SPLITS)}")
    missing = [name for name in SPLITS if name not in loaders]
    if missing:
        raise InputError(f"loaders has no {', '.join(missing)}; it needs all of {', '.join(SPLITS)}")


def _alike(first: Mapping[str, Batch]) -> tuple[str, ...]:
    """What to say of splits that begin alike and had better be apart; of calibration and validation a search does."""
    said = []
    for one, other in (("train", "validation"), ("train", "test"), ("calibration", "test"), ("validation", "test")):
        mine, theirs = (tensors_of(first[name][0]) for name in (one, other))
        if len(mine) == len(theirs) and all(map(_equal, mine, theirs)):
            said.append(
                f"the splits {one} and {other} begin with the same samples: figures on {other} flatter what {one} saw"
            )
    return tuple(said)


def _first_batch(name: str, loader: Iterable[Any]) -> Batch:
    """The first pair of a loader, of which a second look shows the same but for `train`."""
    with drawing(0):  # a DataLoader draws from torch's global generator when it starts
        first, again = (next(iter(loader), None) for _ in range(2))
    if first is None or again is None:
        raise InputError(f"loaders[{name!r}] is empty or can be read once only; pass a list or a DataLoader")
    try:
        pair, twin = ((as_tensors(x), as_tensors(y)) for x, y in map(pair_of, (first, again)))
    except InputError as error:
        raise InputError(f"loaders[{name!r}]: {error}") from None
    alike = [_equal(a, b) for a, b in zip(tensors_of(pair), tensors_of(twin), strict=True)]
    if name != "train" and not all(alike):
        raise InputError(
            f"loaders[{name!r}] shuffles or augments at random; every candidate must see the same samples (train may "
            f"do both, and fine-tuning shuffles by itself), so turn it off"
        )
    return pair


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _spreads(model: nn.Module, batch: Batch) -> bool:
    """Whether a list of inputs is several arguments: `forward` takes as many, and it is no list of samples."""
    inputs = batch[0]
    if not isinstance(inputs, list) or is_listed(inputs, size(batch)):
        return False
    try:
        inspect.signature(model.forward).bind(*inputs)
    except (TypeError, ValueError):
        return False
    return True


def _called_first(model: nn.Module, batch: Batch, spread: bool) -> Any:
    inputs = tuple(batch[0]) if spread and isinstance(batch[0], list) else batch[0]
    try:
        return call_model(model, arguments_of(inputs))
    except InputError:
        raise
    except Exception as error:  # a user's model may fail in any way
        shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors_of(inputs))
        said = f"the model fails on the first batch of its loader ({shapes}): {one_line(error)}"
        if isinstance(inputs, dict) and arguments(model, inputs)[0]:
            said += (
                f"; forward has no parameters {', '.join(map(repr, inputs))}, so it was given the dict as one argument"
            )
        raise InputError(said) from error


def _check_loss(loss_fn: LossFn, returned: Any, targets: Any) -> None:
    """A scalar, where it can be told: a loss of what a model returns in training only fails here and may be right."""
    try:
        loss = loss_fn(returned, targets)
    except Exception:
        return
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shown = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise InputError(f"loss_fn must return a scalar tensor, the mean over the batch, not {shown}")
