"""SPDY: starts at the knapsack, stays on budget, and mends a table that is wrong about some groups."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from autoprune.allocation.budget import LATTICE
from autoprune.codec import Codec
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.protocols import Problem
from autoprune.samplers.spdy import Spdy
from autoprune.strategies.knapsack import knapsack
from autoprune.structure import Structure
from tests.synthetic import Hills, chain, make_problem

STRUCTURE = chain(8)
PROBLEM = make_problem(STRUCTURE)
N_FIRST = LATTICE + 2  # 0.7 and 0.5 come on top of the lattice, 0.3 is its end


def spdy(problem: Problem = PROBLEM, seed: int = 0) -> Spdy:
    return Spdy(problem, np.random.default_rng(seed))


@dataclass(frozen=True)
class Coupled:
    """Groups that are measured one at a time look alike, though half of them matter ten times more together."""

    structure: Structure

    def __call__(self, ask: Ask) -> Evaluation:
        narrow = 1 - Codec(self.structure).encode(ask.policy)
        even = float(np.sum(narrow[::2] ** 2)) + 8 * float(np.sum(narrow[::2])) ** 2 * (np.count_nonzero(narrow) > 1)
        loss = 1e-3 + even + float(np.sum(narrow[1::2] ** 2))
        return Evaluation(ask, loss, {"macs": float(PROBLEM.costs["macs"](ask.policy.array(self.structure)))})


def test_the_first_asks_are_the_knapsack_over_the_budget_range() -> None:
    sampler = spdy()
    asks = [sampler.ask() for _ in range(N_FIRST)]
    targets = sorted({*np.linspace(0.3, 0.9, LATTICE).tolist(), 0.7, 0.5})
    assert [ask.policy for ask in asks] == [knapsack(PROBLEM, t) for t in dict.fromkeys(targets)][: len(asks)]
    assert {(ask.tier, ask.fraction) for ask in asks} == {("refit", 1.0)}


def test_what_the_seeds_hold_is_not_asked_again() -> None:
    evaluate = Hills(STRUCTURE)
    seeds = [evaluate(Ask(knapsack(PROBLEM, t), "refit")) for t in np.linspace(0.3, 0.9, LATTICE)]
    problem = replace(PROBLEM, seeds=tuple(seeds))
    sampler = spdy(problem)
    asked = {sampler.ask().policy for _ in range(N_FIRST)}
    assert not asked & {s.ask.policy for s in seeds}


def test_every_weighted_policy_is_new_and_uses_its_whole_budget() -> None:
    sampler, evaluate = spdy(), Hills(STRUCTURE)
    asks: list[Ask] = []
    for _ in range(60):
        asks.append(sampler.ask())
        sampler.tell(evaluate(asks[-1]))
    assert len({ask.policy for ask in asks}) == len(asks)
    macs = np.array([PROBLEM.costs["macs"](ask.policy.array(STRUCTURE)) for ask in asks])
    targets = np.array([*np.linspace(0.3, 0.9, LATTICE), 0.7, 0.5])
    assert np.all(np.min(np.abs(macs[:, None] - targets), axis=1) < 0.02)


@pytest.mark.parametrize("window", [1, 8])
def test_a_table_that_is_wrong_about_half_the_groups_is_mended(window: int) -> None:
    dense = Codec(STRUCTURE).dense
    table = {
        g.name: {w: float((1 - w / d) ** 2) for w in g.grid[:: max(1, len(g.grid) // 5)]}
        for g, d in zip(STRUCTURE.groups, dense, strict=True)
    }
    problem, evaluate = replace(PROBLEM, table=table, seeds=()), Coupled(STRUCTURE)
    sampler = spdy(problem)
    asks: list[Ask] = []
    answers: list[Evaluation] = []
    for told in range(70):
        while len(asks) < min(70, told + window):
            asks.append(sampler.ask())
        answers.append(evaluate(asks[told]))
        sampler.tell(answers[-1])
    at_half = min(e.loss for e in answers if e.costs["macs"] <= 0.5)
    assert at_half < 0.8 * evaluate(Ask(knapsack(problem, 0.5), "refit")).loss


def test_what_every_policy_of_a_budget_loses_does_not_count() -> None:
    problem, evaluate = replace(PROBLEM, seeds=()), Hills(STRUCTURE)
    ends = [evaluate(Ask(knapsack(problem, target), "refit")).costs["macs"] for target in (0.3, 0.9)]

    def asked(rise: float) -> list[Ask]:
        """The asks where the log loss of all policies rises by `rise` from the narrowest knapsack to the widest."""
        sampler, asks = spdy(problem), list[Ask]()
        for _ in range(N_FIRST + 40):
            asks.append(sampler.ask())
            e = evaluate(asks[-1])
            sampler.tell(replace(e, loss=e.loss * np.exp(np.interp(e.costs["macs"], ends, [0.0, rise]))))
        return asks

    assert asked(rise=0.0) == asked(rise=10.0)


def test_one_group_alone_is_a_problem_too() -> None:
    structure = chain(1)
    sampler, evaluate = spdy(make_problem(structure)), Hills(structure)
    for _ in range(15):
        sampler.tell(evaluate(sampler.ask()))


@pytest.mark.parametrize("options", [{"sigma": 0.0}, {"reach": -1.0}, {"sigma": float("nan")}])
def test_options_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"search\.options\.\w+ must be a positive number"):
        Spdy(PROBLEM, np.random.default_rng(0), **options)


def test_without_a_table_it_says_what_to_set() -> None:
    with pytest.raises(InputError, match="sampler spdy needs the sensitivity table"):
        spdy(replace(PROBLEM, table=None))
