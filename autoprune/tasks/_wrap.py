"""A user's model without a class: `autoprune.task(model, loaders, loss_fn, metric_fn)` makes a Task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import InputError, did_you_mean
from autoprune.protocols import SPLITS, Batch, Direction
from autoprune.tracing.eval_mode import evaluating

LossFn = Callable[[Tensor, Any], Tensor]
MetricFn = Callable[[Tensor, Any], Mapping[str, float]]


def task(
    model: nn.Module,
    loaders: Mapping[str, Iterable[Any]],
    loss_fn: LossFn,
    metric_fn: MetricFn,
    directions: Mapping[str, Direction] | None = None,
) -> WrappedTask:
    """A Task from a trained model and loaders of (inputs, targets) pairs for each of the four splits.

    `inputs` is a tensor, or a tuple of tensors for a model of several inputs. `loss_fn(outputs, targets)` returns a
    scalar for training, `metric_fn(outputs, targets)` floats over a whole split; metrics are maximised unless
    `directions` says "minimize".

    Raises:
        InputError: a split is missing, cannot be read twice, or shuffles where the order must stay.
    """
    for name in loaders:
        if name not in SPLITS:
            raise InputError(f"unknown split {name!r} in loaders; {did_you_mean(name, SPLITS)}")
    missing = [name for name in SPLITS if name not in loaders]
    if missing:
        raise InputError(f"loaders has no {', '.join(missing)}; it needs all of {', '.join(SPLITS)}")
    first = {name: _check_loader(name, loaders[name]) for name in SPLITS}
    inputs = _inputs(first["calibration"])
    with evaluating(model):
        batch = first["validation"]
        names = metric_fn(model(*_inputs(batch)), batch[1])
    if not isinstance(names, Mapping):
        raise InputError(f"metric_fn must return a mapping of names to floats, not a {type(names).__name__}")
    chosen = {name: (directions or {}).get(name, "maximize") for name in names}
    return WrappedTask(model, loaders, loss_fn, metric_fn, (tuple(x[:2].clone() for x in inputs), chosen))


class WrappedTask:
    """The Task that `autoprune.task` makes."""

    def __init__(
        self,
        model: nn.Module,
        loaders: Mapping[str, Iterable[Any]],
        loss_fn: LossFn,
        metric_fn: MetricFn,
        facts: tuple[tuple[Tensor, ...], Mapping[str, Direction]],
    ) -> None:
        self._model, self._loaders, self._loss_fn, self._metric_fn = model, dict(loaders), loss_fn, metric_fn
        self._example, self._directions = facts

    @property
    def directions(self) -> Mapping[str, Direction]:
        return MappingProxyType(dict(self._directions))

    def build(self) -> nn.Module:
        return copy.deepcopy(self._model)

    def example_inputs(self) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in self._example)

    def split(self, name: str) -> Iterable[Batch]:
        if name not in self._loaders:
            raise InputError(f"unknown split {name!r}; {did_you_mean(name, SPLITS)}")
        return self._loaders[name]

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        out: Tensor = model(*_inputs(batch))
        return out

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._loss_fn(self.outputs(model, batch), batch[1])

    def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        outputs, targets = [], []
        with evaluating(model):
            for batch in batches:
                outputs.append(self.outputs(model, batch))
                targets.append(batch[1])
            values = self._metric_fn(torch.cat(outputs), torch.cat(targets))
        return {name: float(value) for name, value in values.items()}


def _inputs(batch: Any) -> tuple[Tensor, ...]:
    return tuple(batch[0]) if isinstance(batch[0], tuple | list) else (batch[0],)


def _check_loader(name: str, loader: Iterable[Any]) -> Any:
    """The first batch; InputError unless a second look shows the same one."""
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws from torch's global generator when it starts
        first, again = (next(iter(loader), None) for _ in range(2))
    if first is None or (again is None and iter(loader) is loader):
        raise InputError(f"loaders[{name!r}] is empty or can be read once only; pass a list or a DataLoader")
    if not isinstance(first, tuple | list) or len(first) != 2:
        raise InputError(f"loaders[{name!r}] must yield (inputs, targets) pairs, not {type(first).__name__}")
    if not all(torch.equal(a, b) for a, b in zip(_inputs(first), _inputs(again), strict=True)):
        raise InputError(
            f"loaders[{name!r}] shuffles; every candidate must see the same samples (fine-tuning shuffles by itself), "
            f"so turn it off"
        )
    return first
