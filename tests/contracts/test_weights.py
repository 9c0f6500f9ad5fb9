"""What every strategy and sampler makes of groups of weights: alone, under a pattern, beside widths and blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autoprune import plugins
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.policy import Policy
from autoprune.protocols import Problem
from autoprune.samplers import build_sampler
from autoprune.space import Space, restrict
from autoprune.strategies import load_strategy
from tests.synthetic import Hills, chain, make_problem, single_steps, sparse, with_blocks

PLAIN = chain(4, grid_step=2)
STRUCTURES = {
    "alone": sparse(PLAIN, alone=True),
    "pattern": restrict(PLAIN, Space(("channel", "2:4"), multiple_of=4)),
    "mixed": sparse(PLAIN),
    "blocks": sparse(with_blocks(PLAIN)),
}
PROBLEMS = {name: make_problem(structure) for name, structure in STRUCTURES.items()}
NOTHING_TO_LEAVE = ("depth_width",)
"""Samplers that need blocks, and say so."""
LOW = {"alone": 0.1, "pattern": 0.5, "mixed": 0.1, "blocks": 0.1}


@pytest.fixture(params=[*STRUCTURES])
def space(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", plugins.names("strategies"))
def test_a_strategy_meets_its_target_to_the_cell_or_refuses_the_kinds(name: str, space: str) -> None:
    structure, problem = STRUCTURES[space], PROBLEMS[space]
    cost = problem.costs["nonzeros"]
    if space == "blocks" and name in ("erk", "owl"):
        with pytest.raises(InputError, match="and the space has block"):
            load_strategy(name, structure)
        return
    strategy = load_strategy(name, structure)
    for target in (LOW[space], 0.5, 0.77):
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


def asked(name: str, problem: Problem, seed: int, n: int) -> list[Ask]:
    """`n` asks, one in flight; some of the answers fail."""
    sampler = build_sampler(name, problem, np.random.default_rng(seed), {})
    evaluate, asks = Hills(problem.structure, fail_share=0.1), list[Ask]()
    for _ in range(n):
        asks.append(sampler.ask())
        try:
            sampler.tell(evaluate(asks[-1]))
        except FloatingPointError as error:
            sampler.tell(Evaluation.failed(asks[-1], str(error)))
    return asks


@pytest.mark.parametrize("name", plugins.names("samplers"))
def test_a_sampler_proposes_on_the_grids_within_the_budget_and_repeats(name: str, space: str) -> None:
    structure, problem = STRUCTURES[space], PROBLEMS[space]
    if name in NOTHING_TO_LEAVE and space != "blocks":
        with pytest.raises(InputError, match="needs blocks"):
            build_sampler(name, problem, np.random.default_rng(0), {})
        return
    problem = replace(problem, budget=replace(problem.budget, low=LOW[space], limits={"bytes": 0.8}))
    asks = asked(name, problem, 1, 10)
    for ask in asks:
        ask.policy.check(structure)
        assert problem.costs["nonzeros"](ask.policy.array(structure)) <= 0.9 + 1e-12
        assert problem.costs["bytes"](ask.policy.array(structure)) <= 0.8 + 1e-12
    assert len({ask.policy for ask in asks}) > 4
    assert asked(name, problem, 1, 10) == asks
