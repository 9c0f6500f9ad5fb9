"""After the search: re-ranking on held-back samples, finalists, validation, and which points are exported.

Fitness samples choose the front and the contenders at each asked budget; with the held-back samples beside them they
thin the front and choose each budget's winner, or the held-back ones alone do after the brief fine-tune; validation
reports, and no choice of the search has seen it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from autoprune.errors import NoPointError, RunError
from autoprune.evaluation import Ask, Evaluation, Labelled, Tier
from autoprune.pareto import pareto_front, thinned
from autoprune.policy import Policy
from autoprune.protocols import Budget, Problem
from autoprune.run.constraints import Constraint, kept
from autoprune.run.ledger import Prices
from autoprune.structure import Structure

MAX_POINTS = 32
"""Points of the front that are scored on validation and exported; the contenders of the asked budgets come on top."""
MAX_FINALISTS = 16
SLACK = 1e-9
Constraints = Sequence[Constraint]
Controls = Mapping[tuple[str, float], Policy]
"""The control arms' policies by (arm, asked budget)."""


def n_finalists(least: int, problem: Problem, prices: Prices, spent: float) -> int:
    """Finalists at each asked budget: `least`, and up to 16 until tuning has a third of the whole ledger."""
    at = problem.budget.at
    if least == 0 or not at:
        return 0
    price = prices.full(Ask(Policy.dense(problem.structure), "tune", split="heldback"), problem.tier)
    third = math.ceil(spent / 2 / (price * len(at)))
    return max(least, min(MAX_FINALISTS, third))


def contenders(
    told: Sequence[Evaluation], n: int, problem: Problem, constraints: Constraints
) -> dict[float, list[Policy]]:
    """At each asked budget the `n` distinct policies of least fitness loss within it."""
    full = sorted(_full(told, problem, constraints), key=lambda e: e.loss)
    budget = problem.budget
    return {
        at: list(dict.fromkeys(e.ask.policy for e in full if e.costs[budget.cost] <= at + SLACK))[:n]
        for at in budget.at
    }


def heldback_asks(
    told: Sequence[Evaluation], chosen: Mapping[float, list[Policy]], problem: Problem, constraints: Constraints
) -> Labelled:
    """The front of the search, thinned, and the contenders on samples that no stage used: against the winner's curse.

    Raises:
        RunError: nothing within the budget succeeded.
    """
    front = _thinned(pareto_front(_full(told, problem, constraints), problem.objectives), problem)
    if not front:
        raise RunError(f"no evaluation within the budget succeeded; {_why_none(told, problem)}")
    policies = dict.fromkeys([*(e.ask.policy for e in front), *(p for row in chosen.values() for p in row)])
    return [(f"front {p.digest}", Ask(p, problem.tier, split="heldback")) for p in policies]


def _why_none(told: Sequence[Evaluation], problem: Problem) -> str:
    if errors := [e.error for e in told if e.error]:
        return f"the first error: {errors[0]}"
    cost, high, whole = problem.budget.cost, problem.budget.high, _whole(told, problem.tier)
    if not whole:
        return f"none of {len(told)} went over all samples: raise search.trials"
    least = min(e.costs[cost] for e in whole)
    return f"the cheapest of {len(whole)} has {cost} {least:.4g}, above {high:g}: raise search.trials"


def finalist_asks(chosen: Mapping[float, list[Policy]]) -> Labelled:
    """The brief fine-tune of the contenders, judged on held-back samples."""
    policies = dict.fromkeys(p for row in chosen.values() for p in row)
    return [(f"finalist {p.digest}", Ask(p, "tune", split="heldback")) for p in policies]


def reranked(told: Iterable[Evaluation], held: Iterable[Evaluation], tier: Tier, prices: Prices) -> list[Evaluation]:
    """The held-back evaluations with the mean loss over fitness and held-back samples together.

    Fitness alone flatters what it has chosen. The fewer held-back samples alone are the noisier: among the best of a
    ResNet-20 search their ranks agreed less with those on 6 000 unseen images than the ranks on both.
    """
    known = {e.ask.policy: e.loss for e in _whole(told, tier)}
    share = prices.heldback / (prices.fitness + prices.heldback)
    seen = [(e, known.get(e.ask.policy, e.loss)) for e in held if e.ok]
    return [replace(e, loss=share * e.loss + (1 - share) * loss) for e, loss in seen]


def winners(
    ranked: Sequence[Evaluation], tuned: Sequence[Evaluation], budget: Budget, constraints: Constraints
) -> dict[float, Policy]:
    """At each asked budget the policy of least loss: on held-back samples after the fine-tune where one succeeded."""
    found: dict[float, Policy] = {}

    def within(limit: float, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        return [e for e in evaluations if e.ok and e.costs[budget.cost] <= limit + SLACK]

    for limit in budget.at:
        fitting = within(limit, tuned) or within(limit, ranked)
        feasible = [e for e in fitting if kept(constraints, e.metrics)] or fitting
        if feasible:
            found[limit] = min(feasible, key=lambda e: e.loss).ask.policy
    return found


def validation_asks(
    ranked: Sequence[Evaluation], chosen: Mapping[float, Policy], controls: Controls, problem: Problem
) -> Labelled:
    """The dense model, the winners, the front as the re-ranking sees it and the control arms, on validation.

    In this order, so that a run that ends by its time limit has scored what counts most.
    """
    tier = problem.tier
    front = pareto_front(ranked, problem.objectives)
    policies: dict[Policy, str] = {}
    for policy in (*chosen.values(), *(e.ask.policy for e in front)):
        policies.setdefault(policy, f"front {policy.digest}")
    policies.pop(Policy.dense(problem.structure), None)
    asks = [("dense", dense_ask(problem.structure))]
    asks += [(label, Ask(policy, tier, split="validation")) for policy, label in policies.items()]
    return asks + [(f"{arm}@{at:g}", Ask(p, tier, split="validation")) for (arm, at), p in controls.items()]


def dense_ask(structure: Structure) -> Ask:
    """The dense model on validation, which every figure stands beside."""
    return Ask(Policy.dense(structure), "refit", split="validation")


def tuned_asks(chosen: Mapping[float, Policy], controls: Controls) -> Labelled:
    """The brief fine-tune of the winners and the control arms, on validation: what is reported."""
    policies = {f"tuned search@{at:g}": p for at, p in chosen.items()}
    policies |= {f"tuned {arm}@{at:g}": p for (arm, at), p in controls.items()}
    return [(label, Ask(p, "tune", split="validation")) for label, p in policies.items()]


def exported(
    scored: Sequence[Evaluation],
    tuned: Sequence[Evaluation],
    chosen: Mapping[float, Policy],
    controls: Controls,
    problem: Problem,
    constraints: Constraints,
) -> tuple[Evaluation, ...]:
    """The evaluations on validation that make the front: none dominated, all constraints kept, every winner in it.

    Fine-tuning has judged the search's points within a budget, so none stays that only looked better before it.

    Raises:
        NoPointError: no point keeps the constraints.
    """
    fine, budget = {e.ask.policy: e for e in tuned if e.ok}, problem.budget
    within = [e for e in scored if e.ok and e.costs[budget.cost] <= budget.high + SLACK]
    fit = [e for e in within if _feasible(constraints, e, fine.get(e.ask.policy))]
    if within and not fit:
        raise NoPointError(_missed(constraints, [*within, *fine.values()]))
    won = [e for e in fit if e.ask.policy in set(chosen.values())]
    standing = {*chosen.values(), *controls.values()}
    judged = bool(tuned) and len(problem.objectives) == 1
    left_out = _outdone(fit, chosen, budget.cost) - standing if judged else set()
    front = pareto_front([e for e in fit if e.ask.policy not in left_out], problem.objectives)
    merged = {e.ask.policy: e for e in (*front, *won)}
    return tuple(sorted(merged.values(), key=lambda e: (e.costs[problem.objectives[0]], e.loss)))


def _outdone(fit: Sequence[Evaluation], chosen: Mapping[float, Policy], cost: str) -> set[Policy]:
    """Policies within a budget whose loss before fine-tuning is not above that of the budget's winner."""
    losses = {e.ask.policy: e.loss for e in fit}
    limits = {at: losses[policy] for at, policy in chosen.items() if policy in losses}
    return {e.ask.policy for e in fit for at, loss in limits.items() if e.costs[cost] <= at + SLACK and e.loss <= loss}


def _feasible(constraints: Constraints, plain: Evaluation, fine: Evaluation | None) -> bool:
    """Whether a point keeps the constraints, fine-tuned where it was tuned."""
    return kept(constraints, plain.metrics if fine is None else fine.metrics)


def _missed(constraints: Constraints, seen: Sequence[Evaluation]) -> str:
    best = {c.metric: max(c.sign * e.metrics[c.metric] for e in seen if c.metric in e.metrics) for c in constraints}
    values = ", ".join(f"{c} (the best point has {c.sign * best[c.metric]:.4g})" for c in constraints)
    return f"no point of the front keeps the constraints on validation: {values}; lower them or allow more cost"


def _full(told: Iterable[Evaluation], problem: Problem, constraints: Constraints) -> list[Evaluation]:
    """Full evaluations at the fitness tier inside the budget range; those that keep the constraints where any do."""
    budget = problem.budget
    within = [e for e in _whole(told, problem.tier) if e.costs[budget.cost] <= budget.high + SLACK]
    return [e for e in within if kept(constraints, e.metrics)] or within


def _whole(told: Iterable[Evaluation], tier: Tier) -> list[Evaluation]:
    """Those on all fitness samples at the fitness tier that succeeded."""
    return [e for e in told if e.ok and e.ask == Ask(e.ask.policy, tier)]


def _thinned(front: Sequence[Evaluation], problem: Problem) -> list[Evaluation]:
    """MAX_POINTS of the front, the best within each asked budget among them."""
    budget = problem.budget
    by_loss = sorted(range(len(front)), key=lambda i: front[i].loss)
    within = ([i for i in by_loss if front[i].costs[budget.cost] <= at + SLACK] for at in budget.at)
    spared = {best for best, *_ in filter(None, within)}
    return thinned(front, MAX_POINTS, problem.objectives, problem.logarithmic, spared)
