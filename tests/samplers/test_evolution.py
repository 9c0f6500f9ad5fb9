"""The evolution sampler: it improves on its seeds, races, repeats nothing, and keeps to the budget range."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from autoprune.allocation.budget import Projector
from autoprune.codec import Codec
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.samplers.evolution import Evolution
from tests import synthetic
from tests.synthetic import Hills, chain, make_problem

STRUCTURE = chain(12)
PROBLEM = make_problem(STRUCTURE)
drive, volume = partial(synthetic.drive, STRUCTURE), partial(synthetic.volume, STRUCTURE)


@pytest.mark.parametrize("fractions", [(1.0,), (0.25, 1.0), (0.125, 0.5, 1.0)])
def test_the_front_gets_better_than_that_of_the_seeds(fractions: tuple[float, ...]) -> None:
    told = drive(Evolution(PROBLEM, np.random.default_rng(0), fractions=fractions), 150)
    assert volume([*PROBLEM.seeds, *told]) > 1.1 * volume(list(PROBLEM.seeds))


def test_nothing_is_asked_twice_and_seeds_are_not_asked_again() -> None:
    asks = [e.ask for e in drive(Evolution(PROBLEM, np.random.default_rng(1)), 200)]
    assert len(set(asks)) == len(asks)
    assert not {a.policy for a in asks} & {s.ask.policy for s in PROBLEM.seeds}


def test_racing_spends_fewer_samples_and_larger_fractions_follow_smaller_ones() -> None:
    told = drive(Evolution(PROBLEM, np.random.default_rng(0), fractions=(0.125, 0.5, 1.0)), 200)
    assert sum(e.passes for e in told) < 0.6 * len(told)
    begun: dict[object, float] = {}
    for evaluation in told:
        ask = evaluation.ask
        assert begun.get(ask.policy, 0.0) < ask.fraction
        assert ask.policy in begun or ask.fraction == 0.125
        begun[ask.policy] = ask.fraction


def test_a_tier_that_costs_much_whatever_the_fraction_is_raced_in_fewer_rounds() -> None:
    rounds = {
        tier: {e.ask.fraction for e in drive(Evolution(replace(PROBLEM, tier=tier), np.random.default_rng(0)), 200)}
        for tier in ("stitch", "refit", "tune")
    }
    assert rounds == {"stitch": {0.125, 0.5, 1.0}, "refit": {0.25, 1.0}, "tune": {1.0}}


def test_a_biased_first_part_of_the_samples_does_not_stop_the_race() -> None:
    sampler = Evolution(PROBLEM, np.random.default_rng(0))
    finished = 0
    for _ in range(150):
        evaluation = Hills(STRUCTURE)(sampler.ask())
        if evaluation.ask.fraction < 1:  # the first samples happen to be three times as hard as all
            evaluation = replace(evaluation, loss=3 * evaluation.loss)
        finished += evaluation.ask.fraction == 1
        sampler.tell(evaluation)
    assert finished > 15


def test_the_whole_budget_range_is_searched() -> None:
    told = drive(Evolution(PROBLEM, np.random.default_rng(0)), 200)
    costs = np.array([e.costs["macs"] for e in told])
    assert np.all(np.histogram(costs, bins=6, range=(0.29, 0.9))[0] >= 10)
    for target in PROBLEM.budget.at:  # many sit right below each budget of the finalists
        assert np.sum((costs <= target) & (costs > target - 0.01)) >= 10


def test_a_difference_goes_on_from_the_worse_of_two_elites_to_the_better() -> None:
    codec = Codec(STRUCTURE)
    one, two = np.tile([1.0, 0.5], 6), np.tile([0.5, 1.0], 6)
    projector = Projector(STRUCTURE, PROBLEM.costs)
    policies = [codec.policy(projector.positions(ratios, {"macs": 0.5})) for ratios in (one, two)]
    better, worse = (codec.ratios(codec.widths(codec.positions(p.array(STRUCTURE)))) for p in policies)
    seeds = tuple(replace(Hills(STRUCTURE)(Ask(p, "refit")), loss=x) for p, x in zip(policies, (0.1, 0.4), strict=True))
    sampler = Evolution(replace(PROBLEM, seeds=seeds), np.random.default_rng(0))
    start = projector.positions(np.full(12, 0.75), {"macs": 0.5})
    moved = [codec.ratios(codec.widths(sampler._difference(start, {"macs": 0.5}))) for _ in range(40)]
    went = (np.array(moved) - codec.ratios(codec.widths(start))) @ (better - worse)
    assert np.all(went >= -0.01)  # a pair of the same elite goes nowhere
    assert np.mean(went > 0.1) > 0.3


def test_a_tiny_space_runs_dry_without_hanging() -> None:
    tiny = chain(1, grid_step=8)
    sampler = Evolution(make_problem(tiny), np.random.default_rng(0), fractions=(1.0,))
    for _ in range(12):
        ask = sampler.ask()
        ask.policy.check(tiny)
        sampler.tell(Hills(tiny)(ask))


def test_losses_that_are_not_positive_are_searched_too() -> None:
    def negate(e: Evaluation) -> Evaluation:
        return replace(e, loss=e.loss - 5.0)

    sampler = Evolution(replace(PROBLEM, seeds=tuple(map(negate, PROBLEM.seeds))), np.random.default_rng(0))
    losses = []
    for _ in range(60):
        evaluation = negate(Hills(STRUCTURE)(sampler.ask()))
        sampler.tell(evaluation)
        losses.append(evaluation.loss)
    assert len(set(losses)) > 30


def test_fractions_must_ascend_to_one() -> None:
    with pytest.raises(InputError, match="must ascend to 1"):
        Evolution(PROBLEM, np.random.default_rng(0), fractions=(0.5, 0.25))


@pytest.mark.parametrize("fractions", [(1.0,), (0.125, 0.5, 1.0)])
def test_a_space_that_is_used_up_is_repeated_in_full_and_disturbs_no_race(fractions: tuple[float, ...]) -> None:
    structure = chain(1)
    problem = make_problem(structure)
    sampler, evaluate = Evolution(problem, np.random.default_rng(0), fractions=fractions), Hills(structure)
    asks: list[Ask] = []
    for told in range(240):
        while len(asks) < told + 16:
            asks.append(sampler.ask())
        sampler.tell(evaluate(asks[told]))
    if len(fractions) > 1:
        full, part = ({a.policy for a in asks if (a.fraction == 1.0) is whole} for whole in (True, False))
        assert part <= full, "what a few samples dropped is measured when nothing new is left"
    repeated = {ask for ask in asks if asks.count(ask) > 1}
    assert repeated
    assert all(ask.fraction == 1.0 for ask in repeated)
