"""The AMC sampler: it starts at the knapsack, learns beyond it, beats the paper's profile, and repeats bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoprune.allocation.walk import PROFILES, build_walk
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.executors.inline import Inline
from autoprune.integrations.gymnasium_env import AmcEnv
from autoprune.protocols import Problem
from autoprune.record.record import Record
from autoprune.record.storage import JOURNAL
from autoprune.run.loop import search_loop
from autoprune.samplers import build_sampler
from autoprune.samplers.amc import AGENTS, Amc
from tests import synthetic
from tests.synthetic import Asks, Hills, MakeHills, chain, make_problem, true_loss

STRUCTURE = chain(9)
PROBLEM = make_problem(STRUCTURE, seeded=False)
SHORT = chain(3)  # a walk of three steps, for tests that have to get past the warm-up
SHORT_PROBLEM = make_problem(SHORT, seeded=False)
UNTAUGHT = {"residual": 29, "classic": 100}  # tells after which an agent has not learned yet; the next one teaches it
drive, volume = partial(synthetic.drive, STRUCTURE), partial(synthetic.volume, STRUCTURE)


def misled(problem: Problem) -> Problem:
    """The table is wrong by a factor of its own for every group: what is left to learn beyond the knapsack."""
    assert problem.table is not None
    wrong = np.exp(0.8 * np.random.default_rng(3).normal(size=len(STRUCTURE)))
    rows = zip(problem.table.items(), wrong, strict=True)
    return replace(problem, table={name: {w: f * loss for w, loss in row.items()} for (name, row), f in rows})


def make(seed: int = 0, problem: Problem = PROBLEM, **options: Any) -> Amc:
    return Amc(problem, np.random.default_rng(seed), **options)


def opinion(sampler: Amc) -> float:
    """The agent's mean action in some state: exactly 0 until a training call has changed the actor."""
    policy = sampler._agent._model.policy  # type: ignore[attr-defined]
    return float(policy.predict(np.full(policy.observation_space.shape, 0.5, np.float32), deterministic=True)[0][0])


def test_the_agent_beats_the_knapsack_the_paper_and_random_search_at_the_same_number_of_trials() -> None:
    n, problem = 120, replace(misled(PROBLEM), n_trials=120)
    ours = volume(drive(make(problem=problem), n))
    knapsacks = [build_walk(problem, "residual").prior(float(t)) for t in np.linspace(0.3, 0.9, 9)]
    assert ours > 1.1 * volume([Hills(STRUCTURE)(Ask(p, "refit")) for p in knapsacks if p is not None])
    assert ours > 1.3 * volume(drive(make(problem=problem, profile="classic"), n))
    assert ours > 1.05 * volume(drive(build_sampler("random", problem, np.random.default_rng(0), {}), n))


def test_the_first_walk_at_each_target_is_the_knapsacks_and_no_other() -> None:
    walk = build_walk(PROBLEM, "residual")
    targets = {*np.linspace(0.3, 0.9, 9).tolist(), *PROBLEM.budget.at}
    priors = {walk.prior(t) for t in targets}
    asked = [e.ask.policy for e in drive(make(), 60)]
    assert priors <= set(asked)
    assert len(set(asked)) >= 58
    assert asked[0] in priors


def test_a_seed_that_is_the_knapsacks_policy_is_not_asked_again() -> None:
    walk = build_walk(PROBLEM, "residual")
    priors = [walk.prior(t) for t in {*np.linspace(0.3, 0.9, 9).tolist(), *PROBLEM.budget.at}]
    seeds = tuple(Hills(STRUCTURE)(Ask(p, "refit")) for p in priors if p is not None)
    asked = {e.ask.policy for e in drive(make(problem=replace(PROBLEM, seeds=seeds)), 30)}
    assert not asked & {s.ask.policy for s in seeds}


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_agent_walks_learns_and_repeats_bit_for_bit(agent: str, profile: str) -> None:
    def run(global_seed: int) -> tuple[list[Ask], float]:
        sampler = make(agent=agent, profile=profile, problem=SHORT_PROBLEM, gradient_steps=2)
        np.random.seed(global_seed), torch.manual_seed(global_seed)
        states = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        told = synthetic.drive(SHORT, sampler, UNTAUGHT[profile] + 8, window=4)
        assert states == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        return [e.ask for e in told], opinion(sampler)

    asks, learned = run(global_seed=1)
    assert learned != 0.0
    assert run(global_seed=2) == (asks, learned)
    assert len(set(asks)) > 12
    for ask in asks:
        ask.policy.check(SHORT)
        assert SHORT_PROBLEM.costs["macs"](ask.policy.array(SHORT)) <= 0.9


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_agent_killed_after_it_began_to_learn_goes_on_as_if_never_killed(
    agent: str, profile: str, tmp_path: Path
) -> None:
    n, lost, untaught = UNTAUGHT[profile] + 14, 10, UNTAUGHT[profile]

    def run(folder: str) -> tuple[int, list[Ask], list[float]]:
        sampler = make(agent=agent, profile=profile, problem=SHORT_PROBLEM, gradient_steps=2)
        asks: list[Ask] = []
        opinions: list[float] = []
        with Record(tmp_path / folder, SHORT, SHORT_PROBLEM.objectives) as record:
            n_recorded = len(record.evaluations)
            for evaluation in search_loop(record, Inline(MakeHills(SHORT)), sampler, Asks(n), window=4):
                asks.append(evaluation.ask)
                opinions.append(opinion(sampler))
        return n_recorded, asks, opinions

    _, asks, opinions = run("whole")
    lines = (tmp_path / "whole" / JOURNAL).read_bytes().splitlines(keepends=True)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / JOURNAL).write_bytes(b"".join(lines[:-lost]) + lines[-lost][:40])
    assert run("killed") == (n - lost, asks, opinions)
    assert set(opinions[:untaught]) == {0.0}
    assert opinions[untaught] != 0.0
    assert len(set(opinions[n - lost - 1 :])) > 1, "it learns after the cut too"


def test_rewards_change_what_is_asked_next() -> None:
    def asked(factor: float) -> list[Ask]:
        sampler, asks = make(), []
        for i in range(45):
            asks.append(sampler.ask())
            evaluation = Hills(STRUCTURE)(asks[-1])
            sampler.tell(replace(evaluation, loss=evaluation.loss * (factor if i == 35 else 1.0)))
        return asks

    plain, other = asked(1.0), asked(3.0)
    assert plain[:36] == other[:36]
    assert plain[36:] != other[36:]


def test_the_paper_walks_to_the_asked_budgets_in_turn() -> None:
    costs = [e.costs["macs"] for e in drive(make(profile="classic"), 30)]
    for i, target in enumerate(PROBLEM.budget.at):
        assert max(costs[i::3]) <= target


def test_losses_below_zero_and_failed_references_are_learned_from_too() -> None:
    sampler = make()
    for i in range(48):
        ask = sampler.ask()
        evaluation = replace(Hills(STRUCTURE)(ask), loss=-1 / (1 + true_loss(STRUCTURE, ask.policy)))
        sampler.tell(Evaluation.failed(ask, "no") if i < 12 else evaluation)


@pytest.mark.parametrize("profile", PROFILES)
def test_an_environment_with_an_unreachable_target_is_refused_when_it_is_made(profile: str) -> None:
    with pytest.raises(InputError, match=r"budget macs=0.001 is out of reach"):
        AmcEnv(PROBLEM, Hills(STRUCTURE), profile, target=0.001)


def test_wrong_options_are_one_clear_line() -> None:
    with pytest.raises(InputError, match="unknown agent 'dpg'; did you mean 'ddpg'"):
        make(agent="dpg")
    with pytest.raises(InputError, match="unknown profile 'residul'; did you mean 'residual'"):
        make(profile="residul")
    with pytest.raises(InputError, match="unknown option 'agnet'; did you mean 'agent'"):
        build_sampler("amc", PROBLEM, np.random.default_rng(0), {"agnet": "td3"})
    for wrong in ({"sigma": 0.0}, {"sigma": math.inf}, {"gradient_steps": 0}, {"gradient_steps": 1.5}):
        with pytest.raises(InputError, match=f"search.options.{next(iter(wrong))} must be"):
            make(**wrong)
    with pytest.raises(InputError, match="sensitivity table"):
        make(problem=replace(PROBLEM, table=None))
    assert make(problem=replace(PROBLEM, table=None), profile="classic").ask()
