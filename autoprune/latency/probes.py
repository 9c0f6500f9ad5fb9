"""Single operations cut out of a model and timed over the widths that they can take."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.costs._latency_features import attainable
from autoprune.costs._latency_table import OpTimes, alignment, thinned
from autoprune.latency.kept import Kept
from autoprune.latency.runtime_here import RuntimeHere
from autoprune.latency.timing import seconds_of
from autoprune.protocols import FloatArray, Step
from autoprune.structure import Structure, TensorSpec
from autoprune.tracing.eval_mode import evaluating
from autoprune.tracing.slim import expected_attributes
from autoprune.tracing.watch import is_depthwise

LEVELS = 40
"""Widths of one side of an operation that are timed, about; the others are taken for the nearest of their alignment."""
ALL = 160
"""Up to so many combinations of both sides are all timed; of more, some lines along each side."""
KNOTS = (1.0, 0.5, 0.2)
"""Lines along a side are timed at these shares of the other side."""
REPEATS = 3
STAGE = "latency probes"
"""What timing them is called while it runs."""

Combination = tuple[int, int]


@dataclass
class Probe:
    """A module with a weight as it runs in the model: its input's shape, and the weights that run just like it."""

    module: nn.Module
    shape: tuple[int, ...]
    uses: dict[str, int] = field(default_factory=dict)
    rows: set[int] = field(default_factory=set)
    columns: set[int] = field(default_factory=set)


def timing_operations(
    model: nn.Module,
    inputs: Sequence[Any],
    structure: Structure,
    runtime: RuntimeHere,
    rng: np.random.Generator,
    kept: Kept,
) -> Generator[Step, None, tuple[OpTimes, ...]]:
    """Times of every conv and linear that runs as a module, over the grids; the order of timing is random.

    What `kept` holds is not timed again.
    """
    found = probes(model, inputs, structure)
    levels = [(thinned(sorted(p.rows), LEVELS), thinned(sorted(p.columns), LEVELS)) for p in found]
    wanted = [(i, pair) for i, sides in enumerate(levels) for pair in combinations(*sides)]
    seen: list[dict[Combination, float]] = [{} for _ in found]
    for done, k in enumerate(rng.permutation(len(wanted))):
        yield Step(STAGE, done, len(wanted), "operations")
        i, pair = wanted[k]
        if (i, *pair) in kept.operations:
            seen[i][pair] = kept.operations[i, *pair]
            continue
        run = load_operation(found[i], pair, runtime)
        seen[i][pair] = 1e3 * min(seconds_of(run, runtime.clock) for _ in range(REPEATS))
        kept.operation(i, pair, seen[i][pair])
    return tuple(
        OpTimes(tuple(p.uses.items()), rows, columns, _rounded(filled(rows, columns, times)))
        for p, (rows, columns), times in zip(found, levels, seen, strict=True)
    )


def probes(model: nn.Module, inputs: Sequence[Any], structure: Structure) -> list[Probe]:
    """The model's convs and linears, alike ones together; found by one forward pass."""
    specs = {spec.name: spec for op in structure.ops for spec in op.tensors}
    found: dict[Any, Probe] = {}
    names = {id(module): name for name, module in model.named_modules()}

    def note(module: nn.Module, args: Any) -> None:
        weight = f"{names[id(module)]}.weight".lstrip(".")
        if weight in specs and args and isinstance(args[0], Tensor):
            _add(found, module, tuple(args[0].shape), structure, specs[weight])

    with _hooked(model, note), evaluating(model):
        model(*inputs)
    return list(found.values())


def combinations(rows: Sequence[int], columns: Sequence[int]) -> list[Combination]:
    """The (row, column) sizes to time: all of few, else the lines at the knots of each side."""
    if len(rows) * len(columns) <= ALL:
        return [(r, c) for r in rows for c in columns]
    lines = {(r, c) for r in knots(rows) for c in columns} | {(r, c) for r in rows for c in knots(columns)}
    return sorted(lines)


def knots(levels: Sequence[int]) -> tuple[int, ...]:
    """Levels near KNOTS of the largest, of its alignment, ascending."""
    largest = levels[-1]
    alike = [s for s in levels if alignment(s) == alignment(largest)]
    return tuple(sorted({min(alike, key=lambda s, at=k * largest: abs(s - at)) for k in KNOTS}))  # type: ignore[misc]


def filled(rows: Sequence[int], columns: Sequence[int], times: Mapping[Combination, float]) -> FloatArray:
    """All times [rows, columns] from those of `combinations`: Gordon's blend of the lines, exact on each of them.

    Between lines it is linear, so a constant plus a product of both sides comes back exactly, and what a width adds
    along one side (an alignment) is kept. Gordon 1969, spline-blended surface interpolation.
    """
    grid = np.array([[times.get((r, c), np.nan) for c in columns] for r in rows])
    if not np.isnan(grid).any():
        return grid
    at_rows, at_columns = knots(rows), knots(columns)
    along_columns = _linear(rows, at_rows) @ grid[[rows.index(k) for k in at_rows]]
    along_rows = grid[:, [columns.index(k) for k in at_columns]] @ _linear(columns, at_columns).T
    both = _linear(rows, at_rows) @ along_rows[[rows.index(k) for k in at_rows]]
    blended = np.where(np.isnan(grid), along_columns + along_rows - both, grid)
    return np.asarray(np.maximum(blended, 0.5 * np.nanmin(grid)))


def load_operation(probe: Probe, sizes: Combination, runtime: RuntimeHere) -> Callable[[], object]:
    """The probe's module with its weight cut to `sizes`, on random inputs of the shape that goes with it."""
    module = narrowed(probe.module, sizes)
    shape = list(probe.shape)
    linear = isinstance(module, nn.Linear)
    wide = getattr(module, "in_features" if linear else "in_channels")
    shape[-1 if linear else len(shape) - 1 - _spatial(module)] = wide
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return runtime.load_operation(module, x.to(module.get_parameter("weight")))


def narrowed(module: nn.Module, sizes: Combination) -> nn.Module:
    """A conv or linear with the first `sizes` of dimensions 0 and 1 of its weight; the given one is untouched."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    depthwise = is_depthwise(module)
    weight = module.get_parameter("weight").detach()[: sizes[0], : sizes[1]]
    twin._parameters["weight"] = nn.Parameter(weight.contiguous(), requires_grad=False)
    for attribute, value in expected_attributes(twin, depthwise):
        setattr(twin, attribute, value)
    bias = module._parameters.get("bias")
    if bias is not None:
        out = int(getattr(twin, "out_features" if isinstance(twin, nn.Linear) else "out_channels"))
        twin._parameters["bias"] = nn.Parameter(bias.detach()[:out].clone(), requires_grad=False)
    return twin.eval()


def _add(
    found: dict[Any, Probe], module: nn.Module, shape: tuple[int, ...], structure: Structure, spec: TensorSpec
) -> None:
    settings = tuple(str(getattr(module, name, None)) for name in ("stride", "padding", "dilation", "groups"))
    key = (type(module), shape, spec.shape, module._parameters.get("bias") is None, settings)
    probe = found.setdefault(key, Probe(module, shape))
    probe.uses[spec.name] = probe.uses.get(spec.name, 0) + 1
    whole = 1 if is_depthwise(module) else getattr(module, "groups", 1)  # conv groups stay as many as they are
    probe.rows |= {s for s in attainable(structure, spec, 0) if s % whole == 0}
    probe.columns |= set(attainable(structure, spec, 1))


@contextmanager
def _hooked(model: nn.Module, note: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    timed = (nn.modules.conv._ConvNd, nn.Linear)
    handles = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, timed)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _linear(sizes: Sequence[int], at: Sequence[int]) -> FloatArray:
    """Matrix [sizes, knots] of linear interpolation, continued beyond the ends."""
    if len(at) == 1:
        return np.ones((len(sizes), 1))
    x, known = np.asarray(sizes, dtype=np.float64), np.asarray(at, dtype=np.float64)
    left = np.clip(np.searchsorted(known, x, side="right") - 1, 0, len(known) - 2)
    share = (x - known[left]) / (known[left + 1] - known[left])
    matrix = np.zeros((len(x), len(known)))
    matrix[np.arange(len(x)), left] = 1.0 - share
    matrix[np.arange(len(x)), left + 1] = share
    return matrix


def _spatial(module: nn.Module) -> int:
    return module.get_parameter("weight").dim() - 2


def _rounded(times: FloatArray) -> tuple[tuple[float, ...], ...]:
    """Four digits are more than a clock gives, and keep the file small."""
    return tuple(tuple(float(f"{t:.4g}") for t in line) for line in times)
