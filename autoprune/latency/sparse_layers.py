"""What zeros are worth in time: one layer dense and as a CSR matrix, over densities, on torch and the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.errors import InputError
from autoprune.latency.timing import Timing, clock_of, measure_ratios
from autoprune.runtimes._csr import csr_twin, why_not
from autoprune.tracing.one_thread import on_threads


@dataclass(frozen=True)
class SparseTime:
    """A layer at a density, on inputs that make `columns` of its product: the CSR product's time over the dense one's.

    `timing` has that ratio, how far it spreads, and the dense layer's milliseconds.
    """

    density: float
    columns: int
    timing: Timing


def sparse_times(
    layer: nn.Module, x: Tensor, densities: Sequence[float], threads: int = 1, seconds: float = 1.0, seed: int = 0
) -> list[SparseTime]:
    """Time `layer`, an nn.Linear or nn.Conv2d, on `x`, dense and with weights of each density as CSR, in turns.

    Which weights stay is drawn with `seed`, each alike; the layer is untouched. `seconds` are about those of all
    densities together. On one thread the clock counts what this process computes, on several it is the wall's.

    Raises:
        InputError: torch multiplies no sparse matrices here, the layer has no sparse twin, or a density is none.
    """
    if said := why_not():
        raise InputError(f"this torch multiplies no sparse matrices: {said}")
    for density in densities:
        if not 0.0 < density <= 1.0:
            raise InputError(f"a density must be in (0, 1], not {density}")
    draw, twins = torch.Generator().manual_seed(seed), list[nn.Module]()
    for density in densities:
        masked = copy.deepcopy(layer).eval()
        weight = masked.get_parameter("weight")
        with torch.no_grad():
            weight.mul_(torch.rand(weight.shape, generator=draw) < density)
        sparse = csr_twin(masked)
        if sparse is None:
            raise InputError(f"{layer} has no sparse twin: it must be a plain nn.Linear, or nn.Conv2d of one group")
        twins.append(sparse)
    with on_threads(threads):
        runs = [_runner(module, x) for module in (copy.deepcopy(layer).eval(), *twins)]
        rng, clock = np.random.default_rng(seed), clock_of("cpu", threads)
        timings = measure_ratios(runs[0], runs[1:], rng, clock, seconds)
        with torch.inference_mode():
            positions = layer(x).numel() // layer.get_parameter("weight").shape[0]
    return [SparseTime(d, positions, timing) for d, timing in zip(densities, timings, strict=True)]


def pays_from(ratios: Mapping[float, float]) -> float | None:
    """The largest density at which, as at all smaller ones, a sparse product takes less than the dense one's time.

    `ratios` are times over the dense one's by density; None where it never does.
    """
    found = None
    for density, ratio in sorted(ratios.items()):
        if ratio >= 1.0:
            break
        found = density
    return found


def _runner(module: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return module(x)

    return run
