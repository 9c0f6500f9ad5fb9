"""Floors and ceilings on task metrics, such as accuracy >= 0.97: how far they are missed, what a sampler is told."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from autoprune.errors import InputError, did_you_mean
from autoprune.evaluation import Ask, Evaluation
from autoprune.protocols import Sampler

PENALTY = 20.0
"""Log loss for a metric that misses its bound by the whole of the bound: a miss of 5 % costs a factor e."""


@dataclass(frozen=True)
class Constraint:
    """`metric` must be at least `bound` (`sign` 1) or at most (`sign` -1)."""

    metric: str
    sign: int
    bound: float

    def miss(self, metrics: Mapping[str, float]) -> float:
        """How far `metrics` miss the bound, as a share of it; 0 where they keep it or say nothing."""
        if self.metric not in metrics:
            return 0.0
        return max(0.0, self.sign * (self.bound - metrics[self.metric])) / max(abs(self.bound), 1e-9)

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.sign > 0 else '<='} {self.bound:g}"


def parse_constraints(given: Mapping[str, str], metrics: Iterable[str]) -> tuple[Constraint, ...]:
    """From {"accuracy": ">=0.97"}; `metrics` are the names that the task has.

    Raises:
        InputError: an unknown metric, or a bound that is not >= or <= a number.
    """
    known = tuple(metrics)
    found = []
    for metric, text in given.items():
        if metric not in known:
            raise InputError(f"constraints: the task has no metric {metric!r}; {did_you_mean(metric, known)}")
        match = re.fullmatch(r"\s*(>=|<=)\s*([-+.\deE]+)\s*", text)
        try:
            bound = float(match[2]) if match else math.nan
        except ValueError:
            bound = math.nan
        if match is None or not math.isfinite(bound):
            raise InputError(f"constraints.{metric} must look like '>=0.97' or '<=0.1', not {text!r}")
        found.append(Constraint(metric, 1 if match[1] == ">=" else -1, bound))
    return tuple(found)


def kept(constraints: Iterable[Constraint], metrics: Mapping[str, float]) -> bool:
    """Whether all constraints hold."""
    return all(c.miss(metrics) == 0.0 for c in constraints)


def penalised(constraints: Iterable[Constraint], evaluation: Evaluation) -> Evaluation:
    """The evaluation with a loss that grows with what it misses; partial ones carry no metrics and stay."""
    miss = sum(c.miss(evaluation.metrics) for c in constraints)
    if miss == 0.0 or not evaluation.ok:
        return evaluation
    loss = evaluation.loss * math.exp(PENALTY * miss) if evaluation.loss > 0 else evaluation.loss + PENALTY * miss
    return replace(evaluation, loss=min(loss, 1e30), penalised=True)


@dataclass(frozen=True)
class Constrained:
    """A sampler that is told penalised losses; the record keeps the true ones."""

    sampler: Sampler
    constraints: tuple[Constraint, ...]

    def ask(self) -> Ask:
        return self.sampler.ask()

    def tell(self, evaluation: Evaluation) -> None:
        """Pass the answer on, with its penalty."""
        self.sampler.tell(penalised(self.constraints, evaluation))
