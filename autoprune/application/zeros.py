"""What apply.json and the card say of a model's zeros: how many, where, in which pattern, in how many bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autoprune.application.formats import bytes_by_format
from autoprune.application.masks import names_in, read_whole
from autoprune.front import Point
from autoprune.matrices import numbers_of
from autoprune.tracing.patterns import follows
from autoprune.tracing.rounding import output_dim

SEMI_STRUCTURED = "2:4"
"""What NVIDIA's sparse tensor cores take; told of every weight that holds it, asked for or not."""


def zeros_in(model: nn.Module, point: Point, path: Path) -> dict[str, Any]:
    """{"zeros": ...} of the weights in the file at `path` that are masked; {} where no masks lie beside it.

    `nonzeros` and `weights` count the numbers of masked weights, `layers` has the density of each and the pattern that
    it holds, `bytes` what these numbers take by format, as 8-bit integers where the file has such (`bytes_by_format`).
    """
    if not (masked := names_in(path)):
        return {}
    stored = read_whole(path, point)
    weights = {name: stored[name] for name, _ in model.named_parameters() if name in masked}
    patterns = {g.matrices[0]: g.pattern for g in point.base.groups if g.pattern}
    layers = {name: _layer(model, name, weight, patterns) for name, weight in weights.items()}
    kept, count = sum(layer["nonzeros"] for layer in layers.values()), sum(w.numel() for w in weights.values())
    sizes = bytes_by_format({name: weight.movedim(_output_dim(model, name), 0) for name, weight in weights.items()})
    return {"zeros": {"nonzeros": kept, "weights": count, "density": kept / count, "layers": layers, "bytes": sizes}}


def _layer(model: nn.Module, name: str, weight: Tensor, patterns: Mapping[str, str]) -> dict[str, Any]:
    """Density, nonzeros and, where it holds one, the pattern of one weight."""
    inputs = 1 - _output_dim(model, name)
    asked = (patterns[name],) if name in patterns else ()
    held = next((p for p in (*asked, SEMI_STRUCTURED) if follows(weight, *numbers_of(p), inputs)), None)
    kept = int(weight.count_nonzero())
    return {"density": kept / weight.numel(), "nonzeros": kept, **({"pattern": held} if held else {})}


def _output_dim(model: nn.Module, name: str) -> int:
    return output_dim(model.get_submodule(name.rpartition(".")[0]))
