"""Timing that survives a busy machine: candidates interleaved at random, ratios within a round, medians over rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autoprune.protocols import FloatArray

Runner = Callable[[], object]
"""Runs a model once on its inputs; returns when the device is done."""
Clock = Callable[[], float]
ENOUGH_S = 0.015
"""Seconds for which one candidate is called in a round; the least of the calls counts, others only ever add to it."""
LONG_S = 0.1
CALLS = (3, 8)


@dataclass(frozen=True)
class Timing:
    """Latency over the dense model's: median and interquartile range over `rounds`; the dense model's median in ms."""

    ratio: float
    iqr: float
    rounds: int
    dense_ms: float


def measure_ratios(
    dense: Runner,
    runners: Sequence[Runner],
    rng: np.random.Generator,
    clock: Clock,
    seconds: float = 10.0,
    rounds: tuple[int, int] = (7, 31),
) -> list[Timing]:
    """Time `runners` against `dense`, all once in every round, in random order.

    There are as many rounds as `seconds` allow, at least rounds[0] and at most rounds[1].
    """
    everyone = [dense, *runners]
    measured: list[FloatArray] = []
    started = time.perf_counter()
    while len(measured) < rounds[1]:
        seen = np.empty(len(everyone))
        for i in rng.permutation(len(everyone)):
            seen[i] = seconds_of(everyone[i], clock)
        measured.append(seen)
        spent = time.perf_counter() - started
        if len(measured) >= rounds[0] and spent * (len(measured) + 1) / len(measured) > seconds:
            break
    return summarise(np.stack(measured))


def summarise(seconds: FloatArray) -> list[Timing]:
    """Seconds [rounds, 1 + candidates], the dense model first -> a Timing for each candidate."""
    ratios = seconds[:, 1:] / seconds[:, :1]
    low, middle, high = np.percentile(ratios, [25, 50, 75], axis=0)
    dense_ms = float(np.median(seconds[:, 0]) * 1e3)
    return [Timing(float(m), float(h - lo), len(seconds), dense_ms) for lo, m, h in zip(low, middle, high, strict=True)]


def clock_of(device: str, threads: int = 1) -> Clock:
    """The clock for a device ("cpu", "cuda", ..): of one thread on a CPU the time that this process computes.

    One thread that never waits computes as long as its latency on a free core is; wall time would count the other
    programs of a busy machine too. Of several threads it is wall time: what they compute together is no latency.
    """
    return time.process_time if device == "cpu" and threads == 1 else time.perf_counter


def seconds_of(run: Runner, clock: Clock) -> float:
    """The least of some calls after one that warms the caches; a call that is long is its own warm-up."""
    first = _timed(run, clock)
    if first > LONG_S:
        return first
    calls = int(np.clip(ENOUGH_S / max(first, 1e-9), *CALLS))
    return min(_timed(run, clock) for _ in range(calls))


def _timed(run: Runner, clock: Clock) -> float:
    start = clock()
    run()
    return clock() - start
