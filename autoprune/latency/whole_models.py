"""The two ways in: fit the latency table that the search predicts from, and measure again what the front exports."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import qmc
from torch import nn
from torch.utils._pytree import tree_leaves

from autoprune import plugins
from autoprune.allocation.budget import Projector, reachable
from autoprune.codec import Codec
from autoprune.costs._latency_features import Features
from autoprune.costs._latency_table import LatencyTable
from autoprune.database.batches import in_format
from autoprune.errors import InputError
from autoprune.estimates import spearman
from autoprune.latency.fit import fit
from autoprune.latency.kept import Kept
from autoprune.latency.probes import timing_operations
from autoprune.latency.runtime_here import batched, device_name, resolve
from autoprune.latency.timing import Runner, Timing, measure_ratios
from autoprune.policy import Policy
from autoprune.protocols import Step, finished
from autoprune.structure import Structure
from autoprune.tracing.copies import copied
from autoprune.tracing.one_thread import on_threads
from autoprune.tracing.slim import slim

TOGETHER = 8
"""Models that are in memory, and interleaved with the dense one, at a time."""
STAGE, AGAIN = "latency of whole models", "latency of the front"
"""What measuring them is called while it runs."""
FIT_S, FINAL_S = 1.0, 2.0
"""Seconds for which each model of a fit and of a front is measured."""


class Clocked(NamedTuple):
    """How it is measured: on which runtime, samples at a time and threads; a table on how many whole models."""

    runtime: str = "auto"
    batch_size: int = 1
    models: int = 24
    threads: int = 1


def fit_latency(
    model: nn.Module,
    inputs: Sequence[Any],
    structure: Structure,
    clocked: Clocked = Clocked(),  # noqa: B008  # it is frozen
    seed: int = 0,
    seconds: float = FIT_S,
) -> LatencyTable:
    """Time the operations and some whole models; fit; say how well the fit predicts models that it has not seen.

    `model` is the dense model, in eval mode, on the device to measure on; it is left untouched. `inputs` are example
    inputs, repeated or cut to the batch size. Half of the models meet MACs budgets, half are drawn over the grids; each
    is measured for about `seconds`.

    Raises:
        InputError: the runtime is not installed or does not take the model, or there are fewer cores than threads.
    """
    return finished(fitting_latency(model, inputs, structure, clocked, None, seed, seconds))


def fitting_latency(
    model: nn.Module,
    inputs: Sequence[Any],
    structure: Structure,
    clocked: Clocked,
    path: Path | None = None,
    seed: int = 0,
    seconds: float = FIT_S,
) -> Generator[Step, None, LatencyTable]:
    """`fit_latency`, operation by operation, then by some models at a time.

    What is measured lies in the file `path` meanwhile, so that a call that was killed is gone on with.
    """
    kept, rng = Kept(path), np.random.default_rng(seed)
    bench = _Bench(model, inputs, structure, clocked)
    with on_threads(clocked.threads):
        ops = yield from timing_operations(bench.dense, bench.inputs, structure, bench.runtime, rng, kept)
        policies = sample_policies(structure, clocked.models, rng)
        timings = yield from bench.measuring(policies, seconds, rng, STAGE, kept)
    ratios = np.array([t.ratio for t in timings])
    widths = np.stack([p.array(structure) for p in policies])
    features = Features(structure, ops)(widths)
    fitted = fit(features, ratios)
    kept.forget()
    return LatencyTable(
        structure=structure.fingerprint,
        runtime=bench.runtime.name,
        batch_size=clocked.batch_size,
        device=bench.device_name,
        dense_ms=float(np.median([t.dense_ms for t in timings])),
        n_models=len(policies),
        coefficients=fitted.coefficients,
        held_out_error=fitted.held_out_error,
        rank_correlation=fitted.rank_correlation,
        macs_correlation=spearman(features.get("macs", np.ones(len(ratios))), ratios),
        ops=ops,
        threads=clocked.threads,
    )


def table_key(
    model: nn.Module,
    inputs: Sequence[Any],
    structure: Structure,
    clocked: Clocked = Clocked(),  # noqa: B008  # it is frozen
    seed: int = 0,
) -> str:
    """12 hex digits of all that decides what `fit_latency` finds for these arguments here."""
    here = resolve(clocked.runtime, _device_of(model), clocked.threads)
    grids = [(g.name, g.grid) for g in structure]
    shapes = [(tuple(x.shape), str(x.dtype)) if isinstance(x, torch.Tensor) else repr(x) for x in tree_leaves(inputs)]
    measured_on = (clocked.runtime, here.name, here.version, device_name(here.device), here.threads)
    asked = (clocked.batch_size, clocked.models, seed)
    what = repr((structure.fingerprint, grids, str(model), shapes, measured_on, asked))
    return hashlib.sha256(what.encode()).hexdigest()[:12]


def remeasure(
    model: nn.Module,
    inputs: Sequence[Any],
    structure: Structure,
    policies: Sequence[Policy],
    clocked: Clocked = Clocked(),  # noqa: B008  # it is frozen
    seed: int = 0,
    seconds: float = FINAL_S,
) -> dict[Policy, Timing]:
    """Measured latency of every policy, in more rounds than a fit takes; arguments as in `fit_latency`.

    Which atoms are kept does not matter to the clock, so the first ones are.
    """
    return finished(remeasuring(model, inputs, structure, policies, clocked, seed, seconds))


def remeasuring(
    model: nn.Module,
    inputs: Sequence[Any],
    structure: Structure,
    policies: Sequence[Policy],
    clocked: Clocked = Clocked(),  # noqa: B008  # it is frozen
    seed: int = 0,
    seconds: float = FINAL_S,
) -> Generator[Step, None, dict[Policy, Timing]]:
    """`remeasure`, some models at a time."""
    bench = _Bench(model, inputs, structure, clocked)
    different = list(dict.fromkeys(policies))
    with on_threads(clocked.threads):
        timings = yield from bench.measuring(different, seconds, np.random.default_rng(seed), AGAIN)
    return dict(zip(different, timings, strict=True))


def sample_policies(structure: Structure, n: int, rng: np.random.Generator) -> list[Policy]:
    """`n` different policies, none dense: half meet MACs budgets over the whole range, half a Latin hypercube.

    Fewer where the grids hold fewer.
    """
    codec, macs = Codec(structure), plugins.load("costs", "macs")(structure)
    projector = Projector(structure, {"macs": macs})
    low, high = reachable(structure, macs)
    targets = np.linspace(low, high, n // 2 + 2)[1:-1] if high > low else np.array([])
    found = [projector.project(rng.random(len(structure)), {"macs": float(t)}) for t in targets]
    cube = qmc.LatinHypercube(len(structure), rng=rng).random(n - len(found))
    found += [codec.policy(np.floor(line * (codec.last + 1)).astype(np.int64)) for line in cube]
    return [p for p in dict.fromkeys(found) if p != Policy.dense(structure)]


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


class _Bench:
    """A dense model on its runtime, and slim ones beside it."""

    def __init__(self, model: nn.Module, inputs: Sequence[Any], structure: Structure, clocked: Clocked) -> None:
        device, threads = _device_of(model), clocked.threads
        self.structure = structure
        self.runtime = resolve(clocked.runtime, device, threads)
        self.dense = self._copy(model)
        self.inputs = batched(inputs, clocked.batch_size, self.runtime.device)
        with on_threads(threads):
            try:
                self._dense_run = self._load(self.dense)
            except InputError as error:
                if clocked.runtime != "auto" or self.runtime.name == "eager":
                    raise
                warnings.warn(f"{error}; latency is measured in eager mode", stacklevel=3)
                self.runtime = resolve("eager", device, threads)
                self._dense_run = self._load(self.dense)

    @property
    def device_name(self) -> str:
        """What the runtime runs on, in words."""
        return device_name(self.runtime.device)

    def _load(self, model: nn.Module) -> Runner:
        return self.runtime.load(model, self.inputs)

    def measuring(
        self,
        policies: Sequence[Policy],
        seconds: float,
        rng: np.random.Generator,
        stage: str,
        kept: Kept | None = None,
    ) -> Generator[Step, None, list[Timing]]:
        """A Timing for each policy, about `seconds` of measuring for each; the first ones are those that are `kept`."""
        kept = kept or Kept()
        for start in range(len(kept.models), len(policies), TOGETHER):
            yield Step(stage, start, len(policies), "models")
            some = policies[start : start + TOGETHER]
            runners = [self._load(self._slim(p)) for p in some]
            kept.more_models(measure_ratios(self._dense_run, runners, rng, self.runtime.clock, seconds * len(some)))
        return list(kept.models)

    def _slim(self, policy: Policy) -> nn.Module:
        small = copied(self.dense)
        slim(small, self.structure, {name: range(width) for name, width in policy.widths})
        return small

    def _copy(self, model: nn.Module) -> nn.Module:
        twin = copied(model).eval().requires_grad_(False).to(self.runtime.device)
        return in_format(twin, torch.contiguous_format)  # what `apply` hands back
