"""Second moments of the inputs of every consumer, streamed in one pass over the statistics samples."""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoprune.protocols import Batch, Task, finished
from autoprune.tracing.calls import LINEAR, outputs_at, parse_call, pick_positions, rows, spatial_count
from autoprune.tracing.padding import real_rows, real_tokens

POSITIONS = 64
"""Output positions of a conv sampled per image: the Gram of 512 images then has 32 768 rows."""


@dataclass(frozen=True)
class Gram:
    """Moments of the input rows u of one weight: U'U / n and `mean`, for each conv group.

    seconds: blocks of U'U / n on its diagonal, nearly always one, float64 [conv groups, columns, columns], of the
    columns that `columns` lists; mean: [conv groups, taps * channels]; energy: mean square of each output, without
    bias, float64 [outputs].
    """

    columns: tuple[Tensor, ...]
    seconds: tuple[Tensor, ...]
    mean: Tensor
    energy: Tensor


Cuts = Mapping[str, Sequence[tuple[int, int]]]
"""For a weight the ranges of its input channels whose second moments are kept, one block each."""


def collect_grams(
    model: nn.Module, weights: Collection[str], task: Task, batches: Iterable[Batch], cuts: Cuts | None = None
) -> dict[str, Gram]:
    """Grams of the named conv and linear weights over `batches`; the model must be in eval mode.

    A weight that is not among `cuts` has one block of all its columns.
    """
    return finished(collecting_grams(model, weights, task, batches, cuts))


def collecting_grams(
    model: nn.Module, weights: Collection[str], task: Task, batches: Iterable[Batch], cuts: Cuts | None = None
) -> Generator[int, None, dict[str, Gram]]:
    """`collect_grams`, batch by batch: yields how many went through."""
    collector = _Collector(model, frozenset(weights), cuts or {})
    for number, batch in enumerate(batches, start=1):
        collector.real = real_tokens(batch)
        with torch.no_grad(), collector:
            task.outputs(model, batch)
        yield number
    return {name: collector.gram(name) for name in collector.count}


class _Collector(TorchFunctionMode):
    def __init__(self, model: nn.Module, wanted: frozenset[str], cuts: Cuts) -> None:
        super().__init__()
        self.names = {id(p): n for n, p in model.named_parameters() if n in wanted}
        self.cuts = cuts
        self.columns: dict[str, tuple[Tensor, ...]] = {}
        self.moments: dict[str, list[Tensor]] = {}
        self.count: dict[str, int] = {}
        self.real: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        call = parse_call(func, args, kwargs or {})
        if call is not None and (name := self.names.get(id(call.weight))) is not None:
            positions = pick_positions(spatial_count(call.kind, out), POSITIONS, seed=0)
            y = outputs_at(call.kind, out if call.bias is None else out - _spread(call.bias, out, call.kind), positions)
            taps = math.prod(call.weight.shape[2:])
            real = real_rows(call.x.shape, positions, self.real) if call.kind in LINEAR else None
            u = rows(call, positions)
            self.add(name, taps, *((u, y) if real is None else (u[:, real], y[real])))
        return out

    def add(self, name: str, taps: int, u: Tensor, y: Tensor) -> None:
        """One more call: input rows [conv groups, n, taps * channels] and outputs [n, outputs]."""
        if name not in self.columns:
            channels = u.shape[2] // taps
            offsets = torch.arange(taps, device=u.device)[:, None] * channels
            ranges = self.cuts.get(name, ((0, channels),))
            self.columns[name] = tuple((offsets + torch.arange(a, b, device=u.device)).flatten() for a, b in ranges)
        parts = self.columns[name]
        own = (u if len(parts) == 1 else u[:, :, columns] for columns in parts)
        seconds = ((part.transpose(1, 2) @ part).double() for part in own)
        found = [u.sum(1).double(), y.square().sum(0).double(), *seconds]
        if name in self.moments:
            for total, value in zip(self.moments[name], found, strict=True):
                total += value
        else:
            self.moments[name] = found
        self.count[name] = self.count.get(name, 0) + u.shape[1]

    def gram(self, name: str) -> Gram:
        mean, energy, *seconds = (m / self.count[name] for m in self.moments.pop(name))
        return Gram(self.columns[name], tuple(seconds), mean, energy)


def _spread(bias: Tensor, y: Tensor, kind: str) -> Tensor:
    """A bias that broadcasts over the output `y`."""
    return bias if kind in LINEAR else bias.view(-1, *[1] * (y.dim() - 2))
