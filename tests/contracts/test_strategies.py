"""The contract of every file in autoprune/strategies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autoprune import plugins
from autoprune.costs.macs import Macs
from autoprune.errors import InputError
from autoprune.policy import Policy
from autoprune.protocols import Problem, Strategy
from autoprune.strategies import load_strategy
from autoprune.structure import Stand, Structure
from tests.plugged import Rough
from tests.synthetic import SPARSE, chain, make_problem, single_steps, sparse_problem

STRUCTURE = chain()


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(STRUCTURE)


@pytest.fixture(params=plugins.names("strategies"))
def strategy(request: pytest.FixtureRequest) -> Strategy:
    loaded: Strategy = plugins.load("strategies", request.param)
    return loaded


@pytest.mark.parametrize("target", [0.25, 0.3, 0.5, 0.77, 0.9])
def test_a_policy_meets_its_target_to_the_cell(strategy: Strategy, problem: Problem, target: float) -> None:
    policy, macs = strategy(problem, target), problem.costs["macs"]
    policy.check(STRUCTURE)
    assert macs(policy.array(STRUCTURE)) <= target
    assert all(macs(p.array(STRUCTURE)) > target for p in single_steps(STRUCTURE, policy))


def test_all_limits_hold_at_once(strategy: Strategy, problem: Problem) -> None:
    bound = replace(problem, budget=replace(problem.budget, limits={"params": 0.4, "bytes": 0.35}))
    widths = strategy(bound, 0.5).array(STRUCTURE)
    assert all(
        float(problem.costs[c](widths)) <= limit for c, limit in (("macs", 0.5), ("params", 0.4), ("bytes", 0.35))
    )
    assert problem.costs["bytes"](widths) <= 0.35


@pytest.mark.parametrize("target", [0.45, 0.8])
def test_a_cost_that_is_not_monotone_is_kept_within_as_well(
    strategy: Strategy, problem: Problem, target: float
) -> None:
    rough = Rough(STRUCTURE)
    budget = replace(problem.budget, cost="rough", limits={"params": 0.7})
    bound = replace(problem, costs={**problem.costs, "rough": rough}, budget=budget, objectives=("rough",))
    assert rough(strategy(bound, target).array(STRUCTURE)) <= target


def test_the_same_problem_gives_the_same_policy(strategy: Strategy, problem: Problem) -> None:
    assert strategy(problem, 0.4) == strategy(problem, 0.4)


def test_a_target_of_one_is_the_dense_model(strategy: Strategy, problem: Problem) -> None:
    assert strategy(problem, 1.0) == Policy.dense(STRUCTURE)


def test_an_unreachable_target_is_an_error_with_the_reachable_range(strategy: Strategy, problem: Problem) -> None:
    with pytest.raises(InputError, match=r"macs=0\.001 is out of reach: macs can be between 0\.\d+ and 1 of dense"):
        strategy(problem, 0.001)


def test_scores_may_be_all_zero(strategy: Strategy, problem: Problem) -> None:
    blank = replace(problem, scores={name: np.zeros_like(s) for name, s in problem.scores.items()})
    strategy(blank, 0.5).check(STRUCTURE)
    assert problem.costs["macs"](strategy(blank, 0.5).array(STRUCTURE)) <= 0.5


def test_the_table_may_be_flat(strategy: Strategy, problem: Problem) -> None:
    flat = replace(problem, table={g.name: {g.grid[0]: 0.0, g.width: 0.0} for g in STRUCTURE.groups})
    policy = strategy(flat, 0.5)
    assert problem.costs["macs"](policy.array(STRUCTURE)) <= 0.5
    assert all(problem.costs["macs"](p.array(STRUCTURE)) > 0.5 for p in single_steps(STRUCTURE, policy))


@pytest.mark.parametrize("grid", [(1,), (1, 4)])
def test_groups_of_one_or_two_widths_are_fine(strategy: Strategy, grid: tuple[int, ...]) -> None:
    groups = [replace(g, grid=(*(w for w in grid[1:]), g.width)) if i % 2 else g for i, g in enumerate(STRUCTURE)]
    structure = Structure(tuple(groups), STRUCTURE.ops, {})
    policy = strategy(make_problem(structure), 0.7)
    policy.check(structure)
    assert Macs(structure)(policy.array(structure)) <= 0.7


def test_a_strategy_that_takes_some_kinds_alone_says_which() -> None:
    last = STRUCTURE.groups[-1]
    block = replace(last, kind="block", width=1, grid=(0, 1), stands=(Stand(last.name, "zero"),))
    blocks = Structure((*STRUCTURE.groups[:-1], block), STRUCTURE.ops, {})
    with pytest.raises(InputError, match=r"strategy erk takes groups of the kind channel, .* and the space has block"):
        load_strategy("erk", blocks)
    assert load_strategy("uniform", blocks)


def test_who_reads_the_table_declares_it(strategy: Strategy, problem: Problem) -> None:
    if not getattr(strategy, "uses_table", False):
        strategy(replace(problem, table=None), 0.5).check(STRUCTURE)


@pytest.mark.parametrize("space", SPARSE)
@pytest.mark.parametrize("name", plugins.names("strategies"))
def test_groups_of_weights_meet_a_target_to_the_cell_or_are_refused(name: str, space: str) -> None:
    problem = sparse_problem(space)
    structure, cost = problem.structure, problem.costs["nonzeros"]
    try:
        strategy = load_strategy(name, structure)
    except InputError as error:
        if "and the space has" not in str(error):
            raise
        return
    for target in (SPARSE[space][0], 0.5, 0.77):
        policy = strategy(problem, target)
        policy.check(structure)
        assert cost(policy.array(structure)) <= target + 1e-12
        assert all(cost(p.array(structure)) > target for p in single_steps(structure, policy))
        assert strategy(problem, target) == policy
    assert strategy(problem, 1.0) == Policy.dense(structure)
    with pytest.raises(InputError, match=r"nonzeros=0\.0001 is out of reach: nonzeros can be between"):
        strategy(problem, 0.0001)
    blank = replace(problem, scores={g: np.zeros_like(s) for g, s in problem.scores.items()})
    assert cost(strategy(blank, 0.5).array(structure)) <= 0.5 + 1e-12


def test_all_strategies_take_weights_alone() -> None:
    for name in ("uniform", "global", "lamp", "erk", "owl", "knapsack", "fastnas"):
        assert load_strategy(name, sparse_problem("alone").structure)
