"""How long an applied model takes beside the dense one, side by side on one runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from autoprune.errors import InputError
from autoprune.latency.runtime_here import RuntimeHere, batched, device_name, resolve
from autoprune.latency.timing import measure_ratios
from autoprune.tracing.eval_mode import evaluating, without_cache
from autoprune.tracing.one_thread import one_thread

SECONDS = 1.0
"""For which the two are measured in turns."""


@one_thread()
def latency_facts(dense: nn.Module, small: nn.Module, inputs: Any, runtime: str, batch_size: int = 1) -> dict[str, Any]:
    """Latency of `small` over that of `dense`, median and interquartile range over rounds, as apply.json keeps it.

    A runtime that does not take the model gives way to eager mode, and `instead_of` says so.
    """
    device = next((p.device for p in dense.parameters()), torch.device("cpu"))
    here = resolve(runtime, device)
    with evaluating(dense), evaluating(small), without_cache(dense), without_cache(small):
        try:
            return _measured(here, dense, small, inputs, batch_size)
        except InputError as error:
            if here.name == "eager":
                raise
            found = _measured(resolve("eager", device), dense, small, inputs, batch_size)
            return {**found, "instead_of": f"{here.name}: {error}"}


def _measured(here: RuntimeHere, dense: nn.Module, small: nn.Module, inputs: Any, batch_size: int) -> dict[str, Any]:
    given = batched(inputs, batch_size, here.device)
    base, run = (here.load(model, given) for model in (dense, small))
    timing = measure_ratios(base, [run], np.random.default_rng(0), here.clock, SECONDS)[0]
    return {
        "runtime": here.name,
        "version": here.version.partition(", source")[0],
        "device": device_name(here.device),
        "threads": here.threads,
        "batch_size": batch_size,
        "dense_ms": timing.dense_ms,
        "ratio": timing.ratio,
        "iqr": timing.iqr,
        "rounds": timing.rounds,
    }
