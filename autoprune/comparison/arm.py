"""One arm of a comparison: a strategy at one seed, its figures on validation, kept in a file once it is finished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autoprune.errors import RunError
from autoprune.estimates import loss_interval
from autoprune.evaluation import Evaluation
from autoprune.files.job import Job
from autoprune.files.whole import write_whole
from autoprune.pareto import front_volume, pareto_front
from autoprune.policy import Policy
from autoprune.protocols import Problem
from autoprune.record.record import Stage
from autoprune.run.after import SLACK, Constraints, dense_ask, reranked
from autoprune.run.constraints import kept
from autoprune.run.ledger import Prices

FORMAT = 2
Timed = Callable[[list[Policy]], Mapping[Policy, Mapping[str, float]]]
"""Measures the latencies of policies where the job wants them; none else."""
SHARED_STAGES = ("table", "proxy")
"""Measured once for all arms, so no arm's figures count them."""
CHARGED_STAGES = ("seed", "search")


@dataclass(frozen=True)
class Scored:
    """A policy's figures on validation: the budget's cost as a ratio to dense, the loss, the `value` of the metric.

    `low` and `high` bound the loss at 95 %, over the samples.
    `sample_losses` are kept at the asked budgets alone; all three are empty where the loss is not a mean over samples.
    `latency` is the measured one with its parts, as policy.json has it; None where none was measured.
    """

    policy: str
    macs_ratio: float
    cost_ratio: float
    loss: float
    value: float | None
    low: float | None = None
    high: float | None = None
    sample_losses: tuple[float, ...] = ()
    latency: Mapping[str, float] | None = None

    @staticmethod
    def of(e: Evaluation, cost: str, metric: str | None) -> Scored:
        """The figures of `e`; `metric` is the task's first one, None where it has none."""
        low, high = loss_interval(e.sample_losses) or (None, None)
        value = None if metric is None else e.metrics.get(metric)
        return Scored(e.ask.policy.digest, e.costs["macs"], e.costs[cost], e.loss, value, low, high, e.sample_losses)


@dataclass(frozen=True)
class Arm:
    """What one strategy reached at one seed: `chosen` at each asked budget (None: nothing within it), and its `front`.

    `evaluations` really ran, `passes` over the calibration data and `seconds` are theirs; `ledger` is what of it the
    search was charged, in full evaluations. `dense` holds the dense model's metrics on validation. `key` identifies
    the job and the data that the figures belong to.
    """

    key: str
    strategy: str
    seed: int
    budgets: tuple[float, ...]
    chosen: tuple[Scored | None, ...]
    front: tuple[Scored, ...]
    dense: Mapping[str, float]
    evaluations: int
    seconds: float
    passes: float
    ledger: float
    hypervolume: float

    @property
    def metric(self) -> str | None:
        """The task's first metric."""
        return next(iter(self.dense), None)

    def save(self, path: Path) -> None:
        """Write the arm, whole or not at all."""
        write_whole(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1))

    @staticmethod
    def load(path: Path, key: str) -> Arm | None:
        """The finished arm in `path`; None where there is none, or one of another key."""
        try:
            a: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if a.pop("format") != FORMAT or a["key"] != key:
                return None
            a["chosen"] = tuple(None if p is None else _scored(p) for p in a["chosen"])
            a["front"], a["budgets"] = tuple(_scored(p) for p in a["front"]), tuple(a["budgets"])
            return Arm(**a)
        except (OSError, ValueError, KeyError, TypeError):  # a file of ours that cannot be read is measured again
            return None


def arm_key(job: Job, identity: Mapping[str, str]) -> str:
    """What an arm's figures depend on: its job (not where it runs), the structure, the weights and the data."""
    plain = {name: part for name, part in job.plain().items() if name not in ("executor", "sync_to")}
    text = json.dumps([plain, dict(identity)], sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class ArmId:
    """Which arm of a comparison: a strategy at a seed, and the `key` of what its figures depend on."""

    strategy: str
    seed: int
    key: str


def closed_form_arm(
    which: ArmId, done: Sequence[Evaluation], problem: Problem, constraints: Constraints, timed: Timed
) -> Arm:
    """The arm of a closed-form strategy from its evaluations at the asked budgets, of dense, along the range.

    Raises:
        RunError: the dense model fails on validation.
    """

    def stands(evaluation: Evaluation) -> bool:  # it succeeded and keeps the constraints, as a search's points do
        return evaluation.ok and kept(constraints, evaluation.metrics)

    n = len(problem.budget.at)
    asked, dense = done[:n], done[n]
    front = pareto_front([e for e in done if e is not dense and stands(e)], (problem.budget.cost,))
    chosen = tuple(e if stands(e) else None for e in asked)
    latencies = timed([e.ask.policy for e in chosen if e is not None])
    return _with(_arm(which, problem, chosen, front, dense, _ran(done), 0.0), chosen, latencies)


def searched_arm(
    which: ArmId,
    evaluations: Mapping[tuple[Stage, int], Evaluation],
    points: Mapping[Policy, Mapping[str, float] | None],
    problem: Problem,
    prices: Prices,
) -> Arm:
    """The arm of a sampler from the record of its search; `points` are the policies of its front and their latencies.

    At each budget stands the point of least re-ranked loss within it: chosen on other samples than those that judge.
    """
    on_front, tier, cost = set(points), problem.tier, problem.budget.cost
    final = [e for e in evaluations.values() if e.ok and e.ask.tier == tier and e.ask.policy in on_front]
    scored = {e.ask.policy: e for e in final if e.ask.split == "validation"}
    held = (e for e in final if e.ask.split == "heldback" and e.ask.policy in scored)
    ranked = reranked(evaluations.values(), held, tier, prices)
    chosen = list[Evaluation | None]()
    for at in problem.budget.at:
        fitting = [e for e in ranked if e.costs[cost] <= at + SLACK]
        best = min(fitting, key=lambda e: (e.loss, e.costs[cost]), default=None)
        chosen.append(None if best is None else scored[best.ask.policy])
    front = pareto_front(scored.values(), (cost,))
    own = [(stage, e) for (stage, _), e in evaluations.items() if stage not in SHARED_STAGES]
    ledger = prices.worth((e.ask for stage, e in own if stage in CHARGED_STAGES), tier)
    dense = next(e for e in evaluations.values() if e.ask == dense_ask(problem.structure))
    return _with(_arm(which, problem, chosen, front, dense, _ran([e for _, e in own]), ledger), chosen, points)


def _with(arm: Arm, chosen: Sequence[Evaluation | None], latencies: Mapping[Policy, Mapping[str, float] | None]) -> Arm:
    """The arm with the latencies of its chosen points."""
    timed = [None if e is None else latencies.get(e.ask.policy) for e in chosen]
    points = zip(arm.chosen, timed, strict=True)
    return replace(arm, chosen=tuple(None if p is None else replace(p, latency=found) for p, found in points))


def _ran(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The first of equal asks, which was evaluated; the others were answered with it and took nothing."""
    return list({e.ask: e for e in reversed(evaluations)}.values())


def _arm(
    which: ArmId,
    problem: Problem,
    chosen: Sequence[Evaluation | None],
    front: Sequence[Evaluation],
    dense: Evaluation,
    ran: Sequence[Evaluation],
    ledger: float,
) -> Arm:
    if not dense.ok:
        raise RunError(f"the dense model fails on validation: {dense.error}")
    cost, metric = problem.budget.cost, next(iter(dense.metrics), None)
    points = tuple(replace(Scored.of(e, cost, metric), sample_losses=()) for e in front)
    return Arm(
        key=which.key,
        strategy=which.strategy,
        seed=which.seed,
        budgets=problem.budget.at,
        chosen=tuple(None if e is None else Scored.of(e, cost, metric) for e in chosen),
        front=points,
        dense=dict(dense.metrics),
        evaluations=len(ran),
        seconds=sum(e.seconds for e in ran),
        passes=sum(e.passes for e in ran),
        ledger=ledger,
        hypervolume=front_volume((((p.cost_ratio,), p.loss) for p in points), problem.logarithmic),
    )


def _scored(values: Mapping[str, Any]) -> Scored:
    return Scored(**{**values, "sample_losses": tuple(values["sample_losses"])})
