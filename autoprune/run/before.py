"""What happens before the search: sensitivity table, choice of the fitness tier, the evaluations that seed it.

Each stage is a generator of evaluations that returns what it found, so that the caller's loop shows all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

import numpy as np

from autoprune import plugins
from autoprune.allocation.knapsack import Allocator, penalties
from autoprune.allocation.sensitivity import load_table, save_table, table_asks, table_of
from autoprune.codec import Codec
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation, Labelled
from autoprune.files.job import Job
from autoprune.files.policy_file import load_front
from autoprune.policy import Policy
from autoprune.protocols import Problem
from autoprune.record.record import Stage
from autoprune.run.choose_tier import Calibrated, calibrate, candidates, proxy_asks
from autoprune.run.setting import Setting
from autoprune.samplers import needs

CONTROL_ARMS = ("uniform", "global")
SEED_TARGETS = 5
"""Budgets between the ends of the range at which each control arm seeds the search, beside the asked ones."""
KNAPSACK_TARGETS = 17
SEED_SHARE = 1 / 3
"""Of the ledger, at most, for seeds that count against it."""

Evaluate = Callable[[Stage, Labelled], Iterator[Evaluation]]
"""Evaluates a labelled list under a stage of the record."""


def tabled(setting: Setting, evaluate: Evaluate) -> Generator[Evaluation, None, Setting]:
    """The setting with its sensitivity table, from its file or measured now; without one where nobody needs it."""
    part = setting.job.search
    n_widths = setting.job.evaluator.sensitivity
    if n_widths == 0 or not needs(part.sampler, part.options).table:
        return setting
    return (yield from with_table(setting, lambda asks: evaluate("table", asks)))


def with_table(
    setting: Setting, evaluate: Callable[[Labelled], Iterator[Evaluation]]
) -> Generator[Evaluation, None, Setting]:
    """The setting with its sensitivity table, whoever asks for it."""
    table = load_table(setting.table_path)
    if table is None:
        answers: list[Evaluation] = []
        for evaluation in evaluate(table_asks(setting.structure, max(1, setting.job.evaluator.sensitivity))):
            answers.append(evaluation)
            yield evaluation
        table = table_of(setting.structure, answers)
        save_table(setting.table_path, table, answers)
    return replace(setting, problem=replace(setting.problem, table=table))


def calibrated(setting: Setting, evaluate: Evaluate) -> Generator[Evaluation, None, tuple[Setting, Calibrated | None]]:
    """The setting at the fitness tier that the cascade chooses, where the job leaves that to it."""
    part = setting.job.evaluator
    if part.fitness != "auto" or part.finetune_steps == 0:
        return setting, None
    chosen = candidates(setting.problem, np.random.default_rng(setting.job.search.seed))
    answers: list[Evaluation] = []
    for evaluation in evaluate("proxy", proxy_asks(chosen)):
        answers.append(evaluation)
        yield evaluation
    found = calibrate(chosen, answers)
    return setting.at_tier(found.tier), found


def seed_asks(setting: Setting, ledger: int | None = None) -> Labelled:
    """The dense policy, the control arms and the knapsack over the budget range, and a warm start's points.

    With a `ledger` they count against it: without the dense policy and, where there is a knapsack, the control arms,
    and thinned to a third of so many full evaluations.
    """
    problem, tier, alone = setting.problem, setting.tier, ledger is not None
    arms = () if alone and problem.table is not None else CONTROL_ARMS
    policies: list[tuple[str, Policy]] = []
    for arm in arms:
        strategy = plugins.load("strategies", arm)
        policies += [(f"{arm}@{t:g}", strategy(problem, t)) for t in seed_targets(setting.job, SEED_TARGETS)]
    if problem.table is not None:
        policies += [(f"knapsack@{t:g}", p) for t, p in knapsack_front(problem, setting.job)]
    policies += _warm(setting)
    if ledger is not None:
        policies = _thinned(policies, max(1, int(ledger * SEED_SHARE)), problem.budget.at)
    dense = [] if alone else [("dense", Policy.dense(setting.structure))]
    return [(label, Ask(policy, tier)) for label, policy in (*dense, *policies)]


def knapsack_front(problem: Problem, job: Job) -> list[tuple[float, Policy]]:
    """The knapsack's policies over the budget range."""
    allocator, prices = Allocator(problem.structure, problem.costs), penalties(problem)
    budget, codec = problem.budget, Codec(problem.structure)
    targets = seed_targets(job, KNAPSACK_TARGETS)
    solved = [allocator.solve(prices, {**budget.limits, budget.cost: target}) for target in targets]
    return [(target, codec.policy(positions)) for target, positions in zip(targets, solved, strict=True)]


def seed_targets(job: Job, n: int) -> list[float]:
    """`n` budgets over the range and the asked ones, from wide to narrow."""
    budget = job.budget.plain()
    between = [float(t) for t in np.linspace(budget.low, budget.high, n)]
    targets = {round(t, 6): t for t in (*between, *budget.at)}  # the asked budgets as they were asked
    return [targets[key] for key in sorted(targets, reverse=True)]


def control_policies(problem: Problem) -> dict[tuple[str, float], Policy]:
    """The control arms at the asked budgets."""
    return {(arm, at): plugins.load("strategies", arm)(problem, at) for arm in CONTROL_ARMS for at in problem.budget.at}


def _warm(setting: Setting) -> list[tuple[str, Policy]]:
    """The points of search.warm_start, on this job's grids.

    Raises:
        InputError: the file is no policy file, or its groups are other ones.
    """
    given = setting.job.warm_start
    if given is None:
        return []
    front, structure = load_front(given), setting.structure
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
