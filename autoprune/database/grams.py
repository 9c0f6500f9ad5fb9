"""Second moments of the inputs of every consumer, streamed in one pass over the statistics samples."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoprune.protocols import Batch, Task
from autoprune.tracing.calls import outputs_at, parse_call, pick_positions, rows, spatial_count

POSITIONS = 64
"""Output positions of a conv sampled per image: the Gram of 512 images then has 32 768 rows."""


@dataclass(frozen=True)
class Gram:
    """Moments of the input rows u of one weight: `second` = U'U / n and `mean`, for each conv group.

    second: float64 [conv groups, taps * channels, taps * channels]; mean: [conv groups, taps * channels];
    energy: mean square of each output, without bias, float64 [outputs].
    """

    second: Tensor
    mean: Tensor
    energy: Tensor


def collect_grams(
    model: nn.Module, weights: Collection[str], task: Task, batches: Iterable[Batch], seed: int = 0
) -> dict[str, Gram]:
    """Grams of the named conv and linear weights over `batches`; the model must be in eval mode."""
    collector = _Collector(model, frozenset(weights), seed)
    with torch.no_grad():
        for batch in batches:
            with collector:
                task.outputs(model, batch)
    return {name: collector.gram(name) for name in collector.second}


class _Collector(TorchFunctionMode):
    def __init__(self, model: nn.Module, wanted: frozenset[str], seed: int) -> None:
        super().__init__()
        self.names = {id(p): n for n, p in model.named_parameters() if n in wanted}
        self.seed = seed
        self.second: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}
        self.energy: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        call = parse_call(func, args, kwargs or {})
        if call is not None and (name := self.names.get(id(call.weight))) is not None:
            positions = pick_positions(spatial_count(call.kind, out), POSITIONS, self.seed)
            y = outputs_at(call.kind, out if call.bias is None else out - _spread(call.bias, out, call.kind), positions)
            self.add(name, rows(call, positions), y)
        return out

    def add(self, name: str, u: Tensor, y: Tensor) -> None:
        moments = (u.transpose(1, 2) @ u).double(), u.sum(1).double(), y.square().sum(0).double()
        for store, value in zip((self.second, self.mean, self.energy), moments, strict=True):
            store[name] = store[name] + value if name in store else value
        self.count[name] = self.count.get(name, 0) + u.shape[1]

    def gram(self, name: str) -> Gram:
        n = self.count[name]
        return Gram(self.second[name] / n, self.mean[name] / n, self.energy[name] / n)


def _spread(bias: Tensor, y: Tensor, kind: str) -> Tensor:
    """A bias that broadcasts over the output `y`."""
    return bias if kind == "linear" else bias.view(-1, *[1] * (y.dim() - 2))
