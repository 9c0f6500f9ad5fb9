"""The Pareto front: of evaluations (pure functions), and as the values of a policy file (Front, Point, Base)."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from autoprune.errors import InputError, did_you_mean
from autoprune.evaluation import Evaluation
from autoprune.policy import Policy
from autoprune.structure import Group


def pareto_front(evaluations: Iterable[Evaluation], costs: Sequence[str]) -> tuple[Evaluation, ...]:
    """Evaluations that no other beats in loss and all `costs`, ascending in the first cost; failed ones are left out.

    Of equals (the same loss and costs) the first told stays, so the front does not depend on chance.
    """
    alive = [e for e in evaluations if e.ok]
    if not alive:
        return ()
    values = np.array([[e.costs[c] for c in costs] + [e.loss] for e in alive])
    order = np.lexsort((np.arange(len(alive)), *values.T[::-1]))
    kept: list[int] = []
    for i in order:
        if not any(bool(np.all(values[j] <= values[i])) for j in kept):
            kept.append(int(i))
    return tuple(alive[i] for i in kept)


def hypervolume(points: npt.NDArray[np.float64], reference: npt.NDArray[np.float64]) -> float:
    """Hypervolume dominated by `points` [n, d] (minimised) up to `reference` [d]; moocore (Fonseca et al. 2006)."""
    import moocore

    inside = points[np.all(points < reference, axis=1)] if len(points) else points
    return float(moocore.hypervolume(inside, ref=reference)) if len(inside) else 0.0


LEAST_LOSS, MOST_LOSS = 1e-6, 10.0


def reference_point(n_costs: int) -> tuple[float, ...]:
    """Where hypervolumes of fronts end: the dense model's cost in every cost, and the logarithm of a loss of 10."""
    return (*(1.0 for _ in range(n_costs)), math.log(MOST_LOSS))


def front_volume(points: Iterable[tuple[Sequence[float], float]], logarithmic: bool = True) -> float:
    """Hypervolume of (cost ratios, loss) up to `reference_point`; without `logarithmic` the loss counts as it is."""
    found = _objectives(points, logarithmic)
    return hypervolume(found, np.array(reference_point(found.shape[1] - 1))) if len(found) else 0.0


def thinned(
    front: Sequence[Evaluation], n: int, costs: Sequence[str], logarithmic: bool = True, spared: Collection[int] = ()
) -> list[Evaluation]:
    """At most `n` of a front, those at the indices `spared` among them: again and again the one of least volume goes.

    That is the one without which the hypervolume falls least (Bader & Zitzler 2011); points spread evenly
    would leave high steps where the loss falls steeply. Hypervolumes end at `reference_point`, or beyond the front
    where that reaches further.
    """
    if len(front) <= n:
        return list(front)
    points = _objectives([([e.costs[c] for c in costs], e.loss) for e in front], logarithmic)
    reference, worst = np.array(reference_point(len(costs))), points.max(axis=0)
    beyond = worst + np.maximum(np.ptp(points, axis=0), 1e-6) / 10
    reference = np.where(worst < reference, reference, beyond)
    left = list(range(len(front)))

    def added(index: int) -> float:
        others = [i for i in left if i != index]
        return hypervolume(points[left], reference) - hypervolume(points[others], reference)

    queue = [(added(i), i) for i in left if i not in spared]
    heapify(queue)
    while len(left) > max(n, len(spared)):
        index = queue[0][1]
        now = added(index)  # it only grows as others go, so what the rest added before is a lower bound
        heapreplace(queue, (now, index))
        if queue[0][1] == index:
            left.remove(heappop(queue)[1])
    return [front[i] for i in left]


def _objectives(points: Iterable[tuple[Sequence[float], float]], logarithmic: bool) -> npt.NDArray[np.float64]:
    """(cost ratios, loss) [points, costs + 1], the logarithm of the loss where that is asked for."""
    return np.array([[*costs, math.log(max(loss, LEAST_LOSS)) if logarithmic else loss] for costs, loss in points])


@dataclass(frozen=True)
class Base:
    """The dense model that a front belongs to: what identifies it, what it costs and scores.

    `costs` are absolute (macs a sample, params, bytes); `metrics` maps a split to its dense metrics; `inputs` are
    {"shape": [...], "dtype": "float32"}; `space` holds granularity, criterion and multiple_of, and how the search
    evaluated (tier, precision, ...); `data` a hash; `directions` says which way a metric is better (maximize where it
    is silent).
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


@dataclass(frozen=True)
class Point:
    """One policy of a front. `keep` lists the kept atoms of every group, ascending, in original coordinates.

    `costs` as in the file: macs, macs_ratio, params, bytes, latency if it was measured. `metrics` maps "validation"
    and, for finalists, "finetuned" to figures. `trial` is the index of the ask in the study.
    """

    id: str
    policy: Policy
    keep: Mapping[str, tuple[int, ...]]
    costs: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]]
    trial: int
    base: Base = field(repr=False)

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

    def __len__(self) -> int:
        return len(self.points)

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
            if match := re.fullmatch(r"(\w+)\s*=\s*(\S+)", text):
                return self._within({match[1]: _number(match[2], text)})
            for point in self.points:
                if point.id == text:
                    return point
            ids = [p.id for p in self.points]
            raise InputError(f"no point {text!r}; {did_you_mean(text, [*ids, 'knee'])}, or macs=0.5, drop=0.01")
        if not limits:
            raise InputError("say which point: macs=0.5, params=..., latency=..., drop=0.01, 'knee' or an id")
        return self._within(limits)

    def _within(self, wanted: Mapping[str, float]) -> Point:
        limits = {c: limit for c, limit in wanted.items() if c != "drop"}
        drop = wanted.get("drop")
        if not self.points:
            raise InputError("the front holds no point")
        fitting = [p for p in self.points if all(p.ratio(c) <= limit + 1e-12 for c, limit in limits.items())]
        if not fitting:
            offers = {c: min((p.ratio(c) for p in self.points), default=float("nan")) for c in limits}
            least = ", ".join(f"{c}={ratio:.4g}" for c, ratio in offers.items())
            raise InputError(f"no point of the front is within {limits}; the least it offers is {least}")
        if drop is None:
            return min(fitting, key=_validation_loss)
        name, dense = _first_metric(self.base)
        sign = -1.0 if self.base.directions.get(name) == "minimize" else 1.0
        drops = {p.id: sign * (dense - p.metrics["validation"][name]) for p in fitting}
        enough = [p for p in fitting if drops[p.id] <= drop + 1e-12]
        if not enough:
            raise InputError(
                f"no point keeps {name} within {drop:g} of dense; the least drop is {min(drops.values()):.4g}"
            )
        return min(enough, key=lambda p: p.ratio(next(iter(self.base.costs))))

    def _knee(self) -> Point:
        """The point farthest below the chord of log-loss against cost between the ends of the front."""
        if not self.points:
            raise InputError("the front is empty, so it has no knee")
        cost = np.array([p.ratio(next(iter(self.base.costs))) for p in self.points])
        loss = np.log(np.maximum([_validation_loss(p) for p in self.points], 1e-12))
        x = (cost - cost.min()) / max(float(np.ptp(cost)), 1e-12)
        y = (loss - loss.min()) / max(float(np.ptp(loss)), 1e-12)
        return self.points[int(np.argmin(x + y))]


def _first_metric(base: Base) -> tuple[str, float]:
    """The first metric of the task on validation, and its dense value."""
    for name, value in base.metrics.get("validation", {}).items():
        if name not in ("loss", "kl", "mse", "cosine"):
            return name, value
    raise InputError("drop= needs a task metric on validation, and the front has none")


def _validation_loss(point: Point) -> float:
    return float(point.metrics["validation"]["loss"])


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{whole!r}: {text!r} is not a number") from None
