"""What the dense model does on a batch: outputs, moments before batch norms, and targets for a refit; seen once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoprune.evaluator.precision import Precision, computing, exactly, widened
from autoprune.evaluator.top_classes import TopClasses
from autoprune.protocols import Batch, Task
from autoprune.tracing.calls import (
    ADDS,
    outputs_at,
    parse_call,
    parse_norm,
    pick_positions,
    same_rows,
    spatial_count,
    undropped,
)
from autoprune.tracing.outputs import faithful
from autoprune.tracing.wiring import Site, batch_norms

REFIT_POSITIONS = 32
MANY = 32_768
"""Values a channel from which every other row is enough for its moments, as both networks are measured alike; from four
times as many every fourth."""
BLOCK = 131_072
"""Values of a block: 512 kB."""
FIRST = 64
"""Rows whose mean is near enough to that of all."""

Moments = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Reference:
    """The dense model on one batch: its outputs, moments of the inputs of batch norms, and targets of the refit.

    A batch norm that is called more than once has no moments of its own and stays as it is.

    A target is the dense output of a weight at fixed positions [samples * positions, outputs]: of the conv itself, or,
    where it closes a residual branch, of the sum; in the type that it was computed in.
    """

    outputs: Tensor | TopClasses
    norms: Mapping[str, Moments]
    targets: Mapping[str, Tensor]


def observe(
    model: nn.Module,
    task: Task,
    batch: Batch,
    sites: Mapping[str, Site] | None = None,
    precision: Precision = "fp32",
) -> Reference:
    """One dense pass in `precision`; targets are recorded for `sites`."""
    return observe_all(model, task, [batch], sites, precision)[0]


def observe_all(
    model: nn.Module,
    task: Task,
    batches: Iterable[Batch],
    sites: Mapping[str, Site] | None = None,
    precision: Precision = "fp32",
    keep: Callable[[int, Reference], Reference] = lambda number, reference: reference,
) -> tuple[Reference, ...]:
    """The same for batches that belong together: their moments are those of all of them.

    `keep` is given each as it comes, without moments, and may put it elsewhere.
    """
    seen, found = [], []
    for number, batch in enumerate(batches):
        watch = _Watch(model, sites or {})
        with torch.no_grad(), computing(model, precision), watch:
            outputs = faithful(task, model, batch).detach()
        found.append(keep(number, Reference(outputs, {}, watch.targets)))
        seen.append(watch.moments)
    single = [name for name in seen[0] if all(len(m.get(name, ())) == 1 for m in seen)]
    norms = {name: pooled([m[name][0] for m in seen]) for name in single}
    return tuple(replace(reference, norms=norms) for reference in found)


Measured = tuple[Tensor, Tensor, int]
"""Mean and variance of so many values."""


def measured(y: Tensor) -> Measured:
    """The moments of a batch, and how much they weigh beside those of others."""
    return *moments(y), y[:, 0].numel()


def pooled(parts: Sequence[Measured]) -> Moments:
    """The moments of all values together; those of one part are its own, to the last bit."""
    if len(parts) == 1:
        return parts[0][:2]
    total = sum(n for _, _, n in parts)
    mean = sum((m * (n / total) for m, _, n in parts[1:]), parts[0][0] * (parts[0][2] / total))
    first = (parts[0][1] + (parts[0][0] - mean).square()) * (parts[0][2] / total)
    return mean, sum(((v + (m - mean).square()) * (n / total) for m, v, n in parts[1:]), first)


def moments(y: Tensor) -> Moments:
    """Mean and biased variance of [N, C, ...] over all but the channels [C]; from some of the rows of a large map.

    Products with ones over blocks that stay in the cache: torch.var_mean takes twenty times as long on a CPU. All is
    counted from the mean of the first rows, or a mean far above the spread would leave nothing of the variance.
    """
    channels, line = y.shape[1], y.shape[1] * (y.shape[-1] if y.dim() > 2 else 1)
    lines, values = y.movedim(1, -1).reshape(-1, line), y[:, 0].numel()
    lines = lines[:: 1 if values < MANY else 2 if values < 4 * MANY else 4]
    size = max(1, BLOCK // line)
    ones = widened(y.new_ones(size))
    total, squares = ones.new_zeros(line), ones.new_zeros(line)
    with exactly(y.device):
        origin = widened(lines[:FIRST]).mean(0).view(-1, channels).mean(0)
        along = origin.repeat(line // channels)
        for part in lines.split(size):
            block = widened(part) - along
            total.addmv_(block.T, ones[: len(block)])
            squares.addmv_(block.square_().T, ones[: len(block)])
    count = lines.numel() // channels
    off = total.view(-1, channels).sum(0) / count
    return origin + off, (squares.view(-1, channels).sum(0) / count - off.square()).clamp_min(0.0)


@dataclass(frozen=True)
class _Open:
    """An output, shaped so by its weight, as a tensor on its way to the addition that it closes."""

    site: Site
    tensor: Tensor
    shape: torch.Size


class _Watch(TorchFunctionMode):
    """Records a dense pass."""

    def __init__(self, model: nn.Module, sites: Mapping[str, Site]) -> None:
        super().__init__()
        self.norms, self.sites = norm_ids(model), sites
        self.names = {id(p): n for n, p in model.named_parameters() if n in sites}
        self.moments: dict[str, list[Measured]] = {}
        self.targets: dict[str, Tensor] = {}
        self.open: dict[int, _Open] = {}  # by the tensor's identity

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (same := undropped(func, args, kwargs)) is not None:
            return same
        opened = [self.open.pop(id(a)) for a in args if isinstance(a, Tensor) and id(a) in self.open]
        norm = parse_norm(func, args, kwargs)
        if norm is not None and id(norm.mean) in self.norms:
            self.moments.setdefault(self.norms[id(norm.mean)], []).append(measured(norm.x))
        out = func(*args, **kwargs)
        if opened and not isinstance(out, Tensor):  # a look at its shape
            self.open.update({id(o.tensor): o for o in opened})
        elif opened and (norm is not None or same_rows(func, args, out)):
            self.open[id(out)] = replace(opened[0], tensor=out)
        elif opened and func in ADDS:
            for o in opened:
                self.targets[o.site.weight] = self._at(o.site, out.reshape(o.shape))
        call = parse_call(func, args, kwargs)
        if call is not None and (name := self.names.get(id(call.weight))) is not None:
            site = self.sites[name]
            if site.closes:
                self.open[id(out)] = _Open(site, out, out.shape)
            elif site.calls == 1:
                self.targets[name] = self._at(site, out)
        return out

    @staticmethod
    def _at(site: Site, y: Tensor) -> Tensor:
        return outputs_at(site.kind, y, positions_of(site.kind, y)).clone()


def positions_of(kind: str, y: Tensor) -> Tensor:
    """The fixed random positions at which a refit looks, for an output of this size."""
    return pick_positions(spatial_count(kind, y), REFIT_POSITIONS, seed=1)


def norm_ids(model: nn.Module) -> dict[int, str]:
    """Batch norms of a model by the identity of their running mean, which is what a call shows."""
    return {id(m.running_mean): n for n, m in batch_norms(model).items()}
