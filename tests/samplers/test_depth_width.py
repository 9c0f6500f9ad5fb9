"""Depth first, then widths, then evolution; a block that is worth little goes, and its budget to the widths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.policy import Policy
from autoprune.protocols import Problem
from autoprune.samplers import build_sampler
from autoprune.samplers.depth_width import DepthWidth
from autoprune.space import Space, restrict
from tests.synthetic import chain, make_problem, with_blocks

STRUCTURE = with_blocks(chain(6))
WORTH = {"block1": 1e-3, "block3": 2.0}


def loss(policy: Policy) -> float:
    """Blocks by `WORTH`, widths alike."""
    total = 1e-4
    for name, width in policy.widths:
        narrow = 1 - width / STRUCTURE.group(name).width
        total += WORTH[name] * narrow if name in WORTH else 0.3 * narrow**2
    return total


def answer(problem: Problem, ask: Ask) -> Evaluation:
    costs = {"macs": float(problem.costs["macs"](ask.policy.array(problem.structure)))}
    return Evaluation(ask, loss(ask.policy), costs, passes=ask.fraction)


def problem_of(n: int = 40) -> Problem:
    table = {g.name: {w: loss(Policy.of({g.name: w})) - 1e-4 for w in g.grid} for g in STRUCTURE}
    return replace(make_problem(STRUCTURE), table=table, seeds=(), n_trials=n)


def run(problem: Problem, n: int, window: int = 4) -> list[Evaluation]:
    sampler = build_sampler("depth_width", problem, np.random.default_rng(0), {})
    asks: list[Ask] = []
    told: list[Evaluation] = []
    while len(told) < n:
        while len(asks) < min(n, len(told) + window):
            asks.append(sampler.ask())
        told.append(answer(problem, asks[len(told)]))
        sampler.tell(told[-1])
    return told


def absent(policy: Policy) -> set[str]:
    return {name for name, width in policy.widths if name in WORTH and not width}


def test_it_begins_with_single_blocks_and_leaves_out_the_one_that_is_worth_least() -> None:
    told = run(problem_of(), 40)
    assert {frozenset(absent(e.ask.policy)) for e in told[:2]} == {frozenset({"block1"}), frozenset({"block3"})}
    assert all(e.ask.fraction < 1 for e in told[:2])
    whole = [e for e in told if e.ask.fraction == 1.0]
    best = min((e for e in whole if e.costs["macs"] <= 0.6), key=lambda e: e.loss)
    assert absent(best.ask.policy) == {"block1"}


def test_it_beats_widths_alone_where_a_block_is_worth_little() -> None:
    problem = problem_of()
    widths = restrict(STRUCTURE, Space(granularity=("channel",)))
    alone = replace(make_problem(widths), table=problem.table, seeds=(), n_trials=40)
    found = min(e.loss for e in run(problem, 40) if e.costs["macs"] <= 0.5 and e.ask.fraction == 1.0)
    sampler = build_sampler("evolution", alone, np.random.default_rng(0), {})
    others = []
    for _ in range(40):
        ask = sampler.ask()
        sampler.tell(answer(alone, ask))
        if ask.fraction == 1.0 and float(alone.costs["macs"](ask.policy.array(widths))) <= 0.5:
            others.append(loss(ask.policy))
    assert found < min(others)


def test_what_cannot_be_is_one_line() -> None:
    plain = make_problem(chain(4))
    with pytest.raises(InputError, match="depth_width needs blocks in the space, and there are none: let space"):
        DepthWidth(plain, np.random.default_rng(0))
    with pytest.raises(InputError, match=r"search.options.tried must be a whole number from 1, not 0"):
        DepthWidth(problem_of(), np.random.default_rng(0), tried=0)
    with pytest.raises(InputError, match="sampler depth_width needs the sensitivity table"):
        DepthWidth(replace(problem_of(), table=None), np.random.default_rng(0))


def test_where_all_blocks_fail_the_widths_are_searched() -> None:
    problem = problem_of()
    sampler = DepthWidth(problem, np.random.default_rng(0))
    for _ in range(2):
        sampler.tell(Evaluation.failed(sampler.ask(), "the loss is nan"))
    asks = []
    for _ in range(10):
        asks.append(sampler.ask())
        sampler.tell(answer(problem, asks[-1]))
    assert not any(absent(ask.policy) for ask in asks[:5])
