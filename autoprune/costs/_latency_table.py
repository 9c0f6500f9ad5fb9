"""The latency table as data: times of single operations over their widths, and how they add up to the model's time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import gcd
from typing import Any

import numpy as np

from autoprune.errors import InputError
from autoprune.policy import IntArray

SCHEMA = "autoprune/latency/1"
VECTOR = 16
"""Channels that the widest vector units and blocked layouts take at a time."""


@dataclass(frozen=True, slots=True)
class OpTimes:
    """Times of one operation: `ms[i][j]` where dimensions 0 and 1 of its weight are rows[i] and columns[j] wide.

    `uses` are the weights that it stands for, each with the calls in one forward pass.
    """

    uses: tuple[tuple[str, int], ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if len(self.ms) != len(self.rows) or any(len(line) != len(self.columns) for line in self.ms):
            raise InputError(f"times of {self.uses}: need {len(self.rows)} lines of {len(self.columns)} numbers")


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """ratio = 1 + sum of coefficient * (feature - 1) over the features of `autoprune.latency.features`.

    Fitted to `n_models` whole models measured on `runtime`, `batch_size` samples at a time, on `threads`.
    `held_out_error` is the mean absolute relative error and `rank_correlation` Spearman's, each model predicted by a
    fit to the others; `macs_correlation` is what the MACs alone would have reached. `structure` is the fingerprint.
    """

    structure: str
    runtime: str
    batch_size: int
    device: str
    dense_ms: float
    n_models: int
    coefficients: Mapping[str, float]
    held_out_error: float
    rank_correlation: float
    macs_correlation: float
    ops: tuple[OpTimes, ...]
    threads: int = 1

    def summary(self) -> dict[str, Any]:
        """What a report or a log prints: everything but the times of the operations."""
        return {k: v for k, v in asdict(self).items() if k not in ("ops", "structure")}

    def verdict(self) -> str:
        """One sentence: how well the table predicts models that it has not seen."""
        worse = self.rank_correlation < self.macs_correlation
        advice = "; raise latency.models, or leave latency out of objectives.costs: MACs rank better" if worse else ""
        on = f"{self.runtime}, {self.batch_size} at a time{'' if self.threads == 1 else f', {self.threads} threads'}"
        return (
            f"latency on {on}: predicted within {self.held_out_error:.1%} "
            f"(held out), rank correlation {self.rank_correlation:.2f} against {self.macs_correlation:.2f} of "
            f"MACs alone; dense {self.dense_ms:.3g} ms{advice}"
        )

    def to_json(self) -> str:
        """One JSON document; `from_json` gives the same table back."""
        return json.dumps({"schema": SCHEMA, **asdict(self)})

    @staticmethod
    def from_json(text: str) -> LatencyTable:
        """The table in `text`; InputError where it holds none of this version."""
        try:
            raw = json.loads(text)
            if raw.pop("schema") != SCHEMA:
                raise InputError(f"the latency table must be of the schema {SCHEMA!r}; remove it to measure anew")
            ops = tuple(
                OpTimes(
                    tuple((str(name), int(calls)) for name, calls in op["uses"]),
                    tuple(op["rows"]),
                    tuple(op["columns"]),
                    tuple(tuple(line) for line in op["ms"]),
                )
                for op in raw.pop("ops")
            )
            return LatencyTable(**raw, ops=ops)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"not a readable latency table ({error}); remove it to measure anew") from None


def alignment(size: int) -> int:
    """16, 8 or 4 where `size` is a multiple of it, else 1: runtimes treat these classes of widths differently."""
    common = gcd(size, VECTOR)
    return common if common >= 4 else 1


def thinned(sizes: Sequence[int], most: int) -> tuple[int, ...]:
    """At most about `most` of `sizes`, ascending: a quarter from each class of alignment, with both ends."""
    chosen = {min(sizes), max(sizes)}
    for kind in (16, 8, 4, 1):
        alike = sorted(s for s in set(sizes) if alignment(s) == kind)
        if alike:
            chosen |= {alike[round(i)] for i in np.linspace(0, len(alike) - 1, min(len(alike), most // 4))}
    return tuple(sorted(chosen))


def nearest_levels(levels: Sequence[int], largest: int) -> IntArray:
    """For each size 0..largest the index of the nearest level of its class of alignment, or of any if there is none."""
    sizes, known = np.arange(largest + 1), np.asarray(levels)
    kinds = np.array([alignment(int(s)) for s in sizes])[:, None] != np.array([alignment(int(k)) for k in known])
    distance = np.abs(sizes[:, None] - known) + (largest + 1) * kinds
    return np.asarray(np.argmin(distance, axis=1), dtype=np.int64)
