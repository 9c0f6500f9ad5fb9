"""The Pareto front: of evaluations (pure functions), and as the values of a policy file (Front, Point, Base)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from autoprune.errors import InputError, did_you_mean
from autoprune.front_table import base_words, flat_row, front_html, front_words, point_html, point_words
from autoprune.policy import Policy
from autoprune.structure import FINGERPRINT_VERSION, Group

COUNTS = ("macs", "params", "bytes", "nonzeros", "effective_macs")
"""Costs that are counts, whatever arithmetic they came from."""


@dataclass(frozen=True)
class Base:
    """The dense model that a front belongs to: what identifies it, what it costs and scores.

    `costs` are absolute (macs a sample, params, bytes, a plugged-in one in its own unit); `metrics` maps a split to its
    dense metrics; `inputs` are {"shape": [...], "dtype": "float32"}; `space` holds granularity, criterion and
    multiple_of, and how the search evaluated (tier, precision, ...); `data` a hash; `directions` says which way a
    metric is better (maximize where it is silent); `shapes` are the dense shapes of all parameters and buffers by name
    (none in files of 0.1.0). Structure fingerprints of different `fingerprint_version`s do not compare. `order` ranks
    the atoms of a group, the one kept longest first. `task` is the job's, by name or factory with its arguments; empty
    where it was lent from Python.
    """

    structure_fingerprint: str
    weights_fingerprint: str
    model: str
    inputs: tuple[Mapping[str, Any], ...]
    costs: Mapping[str, float]
    metrics: Mapping[str, Mapping[str, float]]
    groups: tuple[Group, ...]
    space: Mapping[str, Any]
    data: str
    directions: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    fingerprint_version: int = FINGERPRINT_VERSION
    order: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return base_words(self)


@dataclass(frozen=True)
class Point:
    """One policy of a front. `keep` lists the kept atoms of every group, ascending, in original coordinates.

    `costs` as in the file: macs, macs_ratio, params, bytes, plugged-in ones by their name, latency if it was measured.
    `losses` and `metrics` map "validation" and, for finalists, "finetuned" to a loss (its name, value, and perhaps low
    and high) and to the task's metrics; `finetuned` is what trained those: recipe, steps, seed. `trial` is the index of
    the ask in the study. Groups of kind `weight` are not in `keep`: those that have zeros are in `masks`, by a hash.
    """

    id: str
    policy: Policy
    keep: Mapping[str, tuple[int, ...]]
    costs: Mapping[str, Any]
    losses: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, Mapping[str, float]]
    trial: int
    base: Base = field(repr=False)
    finetuned: Mapping[str, Any] = field(default_factory=dict)
    masks: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return point_words(self)

    def _repr_html_(self) -> str:
        """The point beside the dense model, in a notebook."""
        return point_html(self)

    def loss(self, split: str = "validation") -> float:
        """The loss on validation, or that after the fine-tune."""
        return float(self.losses[split]["loss"])

    def ratio(self, cost: str) -> float:
        """The ratio of `cost` (macs, params, bytes, latency) to the dense model."""
        if cost == "latency":
            if "latency" not in self.costs:
                raise InputError(f"point {self.id} has no measured latency; it has {', '.join(self.costs)}")
            return float(self.costs["latency"]["ratio"])
        if cost not in self.base.costs:
            raise InputError(f"unknown cost {cost!r}; {did_you_mean(cost, [*self.base.costs, 'latency'])}")
        return float(self.costs[cost]) / float(self.base.costs[cost])


@dataclass(frozen=True)
class Front(Sequence[Point]):
    """Points ascending in their first cost, with their base and the record of how they came to be."""

    points: tuple[Point, ...]
    base: Base
    measured_on: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def __repr__(self) -> str:
        return front_words(self)

    def _repr_html_(self) -> str:
        """The dense model and all points, in a notebook."""
        return front_html(self)

    def __len__(self) -> int:
        return len(self.points)

    @property
    def cost(self) -> str:
        """The cost that the points ascend in: the search's first objective, as far as the file says."""
        named = self.provenance.get("objectives") or [next(iter(self.base.costs), "macs")]
        return str(named[0])

    @overload
    def __getitem__(self, index: int) -> Point: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Point]: ...
    def __getitem__(self, index: int | slice) -> Point | Sequence[Point]:
        return self.points[index]

    def select(self, at: str | None = None, **limits: float) -> Point:
        """The best point: `select(macs=0.5)`, `select("macs=0.5")`, `select("drop=0.01")`, `select("knee")`, an id.

        A cost limit is a ratio to dense; among the points within all limits the one of least validation loss wins.
        `drop` is the largest fall of the first validation metric against dense; the cheapest such point wins.

        Raises:
            InputError: no point satisfies it (says what the front offers), or the word is unknown.
        """
        if at is not None:
            if not isinstance(at, str) or limits:
                raise InputError(f"say one thing: select(macs=0.5), select('drop=0.01'), 'knee' or an id, not {at!r}")
            text = at.strip()
            if text == "knee":
                return self._knee()
            if match := re.fullmatch(r"([\w.:]+)\s*=\s*(\S+)", text):
                return self._within({match[1]: _number(match[2], text)})
            for point in self.points:
                if point.id == text:
                    return point
            ids = [p.id for p in self.points]
            raise InputError(f"no point {text!r}; {did_you_mean(text, [*ids, 'knee'])}, or macs=0.5, drop=0.01")
        if not limits:
            raise InputError("say which point: macs=0.5, params=..., latency=..., drop=0.01, 'knee' or an id")
        return self._within(limits)

    def to_dataframe(self) -> Any:
        """A pandas.DataFrame with the rows and columns of front.csv: one row a point, ids as its index.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise InputError(
                f"to_dataframe needs pandas, which cannot be imported ({error}): pip install pandas, or read front.csv"
            ) from error
        rows = [flat_row(point) for point in self]
        return pandas.DataFrame(rows, columns=None if rows else ["id"]).set_index("id")

    def _within(self, wanted: Mapping[str, float]) -> Point:
        limits = {c: limit for c, limit in wanted.items() if c != "drop"}
        drop = wanted.get("drop")
        if not self.points:
            raise InputError("the front holds no point")
        for name, value in wanted.items():
            self._check_limit(name, value)
        fitting = [p for p in self.points if all(p.ratio(c) <= limit + 1e-12 for c, limit in limits.items())]
        if not fitting:
            offers = {c: min((p.ratio(c) for p in self.points), default=float("nan")) for c in limits}
            least = ", ".join(f"{c}={ratio:.4g}" for c, ratio in offers.items())
            raise InputError(f"no point of the front is within {limits}; the least it offers is {least}")
        if drop is None:
            return min(fitting, key=Point.loss)
        name, dense = _first_metric(self.base)
        sign = -1.0 if self.base.directions.get(name) == "minimize" else 1.0
        lacking = [p.id for p in fitting if name not in p.metrics.get("validation", {})]
        if lacking:
            raise InputError(f"drop= needs {name} on validation, and point {lacking[0]} has none")
        drops = {p.id: sign * (dense - p.metrics["validation"][name]) for p in fitting}
        enough = [p for p in fitting if drops[p.id] <= drop + 1e-12]
        if not enough:
            raise InputError(
                f"no point keeps {name} within {drop:g} of dense; the least drop is {min(drops.values()):.4g}"
            )
        return min(enough, key=lambda p: p.ratio(self.cost))

    def _check_limit(self, name: str, value: float) -> None:
        """InputError where a limit means nothing: no number, or a ratio to the dense model that is not one."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{name}={value!r}: a limit is a finite number")
        if name == "drop":
            return self._check_drop(value)
        most = max(1.0, *(p.ratio(name) for p in self.points))  # a latency may be above that of the dense model
        if value <= 0.0 or (value > 1.0 and most <= 1.0):
            hint = f"; did you mean {name}={value / 100:g}?" if 1.0 < value <= 100.0 else ""
            raise InputError(f"{name}={value:g}: a limit is a ratio to the dense model, in (0, 1]{hint}")

    def _check_drop(self, value: float) -> None:
        """InputError where more than the whole of a share may be lost: per cent were meant."""
        metric, dense = _first_metric(self.base)
        seen = [dense, *(p.metrics.get("validation", {}).get(metric, dense) for p in self.points)]
        if value > 1.0 and all(0.0 <= found <= 1.0 for found in seen):
            hint = f"; did you mean drop={value / 100:g}?" if value <= 100.0 else ""
            raise InputError(f"drop={value:g}: {metric} is a share, of which at most 1 can be lost{hint}")

    def _knee(self) -> Point:
        """The point farthest below the chord of log-loss against cost between the ends of the front."""
        if not self.points:
            raise InputError("the front is empty, so it has no knee")
        cost = np.array([p.ratio(self.cost) for p in self.points])
        loss = np.log(np.maximum([p.loss() for p in self.points], 1e-12))
        x = (cost - cost.min()) / max(float(np.ptp(cost)), 1e-12)
        y = (loss - loss.min()) / max(float(np.ptp(loss)), 1e-12)
        return self.points[int(np.argmin(x + y))]


def _first_metric(base: Base) -> tuple[str, float]:
    """The first metric of the task on validation, and its dense value."""
    for name, value in base.metrics.get("validation", {}).items():
        return name, value
    raise InputError("drop= needs a task metric on validation, and the front has none")


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{whole!r}: {text!r} is not a number") from None
