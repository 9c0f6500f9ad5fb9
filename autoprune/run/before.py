"""What happens before the search: sensitivity table, choice of the fitness tier, the evaluations that seed it.

Each stage is a generator of evaluations that returns what it found, so that the caller's loop shows all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from autoprune import plugins
from autoprune.allocation.knapsack import Allocator, penalties
from autoprune.allocation.sensitivity import Table, TablePlan, load_table, save_table, table_asks, table_of
from autoprune.codec import Codec
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation, Labelled
from autoprune.files.job import Job
from autoprune.files.policy_file import load_front
from autoprune.policy import Policy
from autoprune.protocols import Budget, Problem
from autoprune.run.choose_tier import TierChoice, candidates, choose_tier, proxy_asks
from autoprune.samplers import needs
from autoprune.strategies import load_strategy, uses_table
from autoprune.structure import Structure

SEED_TARGETS = 5
"""Budgets between the ends of the range at which each control arm seeds the search, beside the asked ones."""
KNAPSACK_TARGETS = 17
SEED_SHARE = 1 / 3
"""Of the ledger, at most, for seeds that count against it."""

Evaluate = Callable[[Labelled], Iterator[Evaluation]]
"""Evaluates a labelled list under a stage of the record."""


def needs_table(job: Job, controls: Iterable[str]) -> bool:
    """Whether the sampler or a control arm works from a sensitivity table, and the job lets it be measured."""
    wanted = needs(job.search.sampler, job.options("search")).table or any(map(uses_table, controls))
    return job.evaluator.has_table and wanted


def measured_table(
    structure: Structure, path: Path, plan: TablePlan, evaluate: Evaluate
) -> Generator[Evaluation, None, Table]:
    """The sensitivity table from its file, or measured now as planned."""
    table = load_table(path)
    if table is not None:
        return table
    answers: list[Evaluation] = []
    for evaluation in evaluate(table_asks(structure, plan)):
        answers.append(evaluation)
        yield evaluation
    made = table_of(structure, answers)
    save_table(path, made, plan, answers)
    return made


def chosen_tier(problem: Problem, seed: int, evaluate: Evaluate) -> Generator[Evaluation, None, TierChoice]:
    """The fitness tier that the cascade chooses."""
    chosen = candidates(problem, np.random.default_rng(seed))
    answers: list[Evaluation] = []
    for evaluation in evaluate(proxy_asks(chosen)):
        answers.append(evaluation)
        yield evaluation
    return choose_tier(chosen, answers)


def seed_asks(
    problem: Problem, controls: Sequence[str], warm_start: Path | None = None, ledger: int | None = None
) -> Labelled:
    """The dense policy, the control arms and the knapsack over the budget range, and a warm start's points.

    With a `ledger` they count against it: without the dense policy and, where there is a knapsack, the control arms,
    and thinned to a third of so many full evaluations.
    """
    alone, budget = ledger is not None, problem.budget
    arms = () if alone and problem.table is not None else controls
    policies: list[tuple[str, Policy]] = []
    for arm in arms:
        strategy = load_strategy(arm, problem.structure)
        policies += [(f"{arm}@{t:g}", strategy(problem, t)) for t in seed_targets(budget, SEED_TARGETS)]
    if problem.table is not None:
        policies += [(f"knapsack@{t:g}", p) for t, p in knapsack_front(problem)]
    policies += [] if warm_start is None else _warm(warm_start, problem.structure)
    if ledger is not None:
        policies = _thinned(policies, max(1, int(ledger * SEED_SHARE)), budget.at)
    dense = [] if alone else [("dense", Policy.dense(problem.structure))]
    return [(label, Ask(policy, problem.tier)) for label, policy in (*dense, *policies)]


def knapsack_front(problem: Problem) -> list[tuple[float, Policy]]:
    """The knapsack's policies over the budget range."""
    allocator, prices = Allocator(problem.structure, problem.costs), penalties(problem)
    budget, codec = problem.budget, Codec(problem.structure)
    targets = seed_targets(budget, KNAPSACK_TARGETS)
    solved = [allocator.solve(prices, {**budget.limits, budget.cost: target}) for target in targets]
    return [(target, codec.policy(positions)) for target, positions in zip(targets, solved, strict=True)]


def seed_targets(budget: Budget, n: int) -> list[float]:
    """`n` budgets over the range and the asked ones, from wide to narrow."""
    between = [float(t) for t in np.linspace(budget.low, budget.high, n)]
    targets = {round(t, 6): t for t in (*between, *budget.at)}  # the asked budgets as they were asked
    return [targets[key] for key in sorted(targets, reverse=True)]


def control_policies(problem: Problem, controls: Sequence[str]) -> dict[tuple[str, float], Policy]:
    """The control arms at the asked budgets."""
    return {
        (arm, at): load_strategy(arm, problem.structure)(problem, at) for arm in controls for at in problem.budget.at
    }


def usable(controls: Sequence[str], structure: Structure) -> tuple[str, ...]:
    """Those of the control arms that take every kind of group that the space has; silence takes all."""
    kinds = {group.kind for group in structure}

    def takes(name: str) -> bool:
        return kinds <= set(getattr(plugins.load("strategies", name), "kinds", kinds))

    return tuple(filter(takes, controls))


def _warm(given: Path, structure: Structure) -> list[tuple[str, Policy]]:
    """The points of search.warm_start, on this job's grids.

    Raises:
        InputError: the file is no policy file, or its groups are other ones.
    """
    front = load_front(given)
    theirs, ours = {g.name: g.width for g in front.base.groups}, {g.name: g.width for g in structure}
    other = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
    if other:
        said = f"{other[0]}: {theirs.get(other[0], 'no group')} wide there, {ours.get(other[0], 'no group')} here"
        raise InputError(f"search.warm_start: {given} belongs to another structure or space ({said})")
    codec = Codec(structure)
    return [(f"warm {p.id}", codec.policy(codec.floor(codec.encode(p.policy)))) for p in front]


def _thinned(policies: Sequence[tuple[str, Policy]], n: int, asked: Sequence[float]) -> list[tuple[str, Policy]]:
    """`n` of them in their order: those at the asked budgets first, the rest evenly."""
    if len(policies) <= n:
        return list(policies)
    ends = tuple(f"@{at:g}" for at in asked)
    first = [i for i, (label, _) in enumerate(policies) if label.endswith(ends)][:n]
    rest = [i for i in range(len(policies)) if i not in first]
    spread = [rest[round(i)] for i in np.linspace(0, len(rest) - 1, n - len(first))]
    return [policies[i] for i in sorted([*first, *spread])]
