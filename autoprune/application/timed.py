"""How long an applied model takes beside the dense one, side by side on one runtime."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autoprune.errors import InputError
from autoprune.exports.onnx import session
from autoprune.latency.runtime_here import RuntimeHere, batched, device_name, resolve
from autoprune.latency.timing import clock_of, measure_ratios
from autoprune.tracing.copies import copied
from autoprune.tracing.eval_mode import evaluating, without_cache
from autoprune.tracing.inputs import batch_size as size_of
from autoprune.tracing.inputs import example_tuple
from autoprune.tracing.one_thread import on_threads
from autoprune.tracing.tensors_only import TensorsOnly

SECONDS = 1.0
"""For which the two are measured in turns."""


def latency_facts(
    dense: nn.Module, small: nn.Module, inputs: Any, runtime: str, batch_size: int = 1, threads: int = 1
) -> dict[str, Any] | str:
    """Latency of `small` over that of `dense`, median and interquartile range over rounds, as apply.json keeps it.

    A runtime that is not here or does not take the model gives way to eager mode, and a model that wants the samples of
    its example together gets them; `instead_of` says so. A line where it cannot be timed at all.
    """
    device, own = next((p.device for p in dense.parameters()), torch.device("cpu")), size_of(inputs)
    first = resolve(runtime, device).name if runtime == "auto" else runtime
    ways = dict.fromkeys((name, size) for size in (batch_size, own) for name in (first, "eager"))
    said = ""
    with on_threads(threads), evaluating(dense), evaluating(small), without_cache(dense), without_cache(small):
        for name, size in ways:
            try:
                found = _measured(resolve(name, device, threads), dense, small, example_tuple(inputs), size)
            except InputError as error:
                said = said or str(error)
            else:
                return {**found, "instead_of": said} if said else found
    return said


def file_latency(
    first: Path, second: Path, model: nn.Module, inputs: Any, batch_size: int = 1, threads: int = 1
) -> dict[str, Any]:
    """Latency of one ONNX file over that of another, both of `model`, on onnxruntime and so many threads."""
    device = torch.device("cpu")
    with evaluating(model), without_cache(model):
        given = TensorsOnly(model, batched(example_tuple(inputs), batch_size, device)).tensors
    base, run = (partial(session(path, threads), given) for path in (first, second))
    timing = measure_ratios(base, [run], np.random.default_rng(0), clock_of("cpu", threads), SECONDS)[0]
    found = {"ratio": timing.ratio, "iqr": timing.iqr, "rounds": timing.rounds, "float_ms": timing.dense_ms}
    return {**found, "threads": threads}


def _measured(here: RuntimeHere, dense: nn.Module, small: nn.Module, inputs: Any, batch_size: int) -> dict[str, Any]:
    given = batched(inputs, batch_size, here.device)
    base, run = (here.load(_there(model, here.device), given) for model in (dense, small))
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


def _there(model: nn.Module, device: torch.device) -> nn.Module:
    """The model where it lies on that device, else a copy there: the lent one stays where it is."""
    lies = next((p.device for p in model.parameters()), device)
    return model if lies.type == device.type else copied(model).to(device)
