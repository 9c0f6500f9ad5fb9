"""The contract of every sampler: the files in autoprune/samplers and the names of the Optuna bridge."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from autoprune import plugins
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.executors.inline import Inline
from autoprune.protocols import Problem, Sampler
from autoprune.record.record import Record
from autoprune.record.storage import JOURNAL
from autoprune.run.loop import search_loop
from autoprune.samplers import build_sampler, needs
from autoprune.structure import Structure
from tests.plugged import Rough
from tests.synthetic import SPARSE, Asks, Hills, MakeHills, chain, make_problem, sparse_problem, with_blocks

STRUCTURE = with_blocks(chain(4, grid_step=2))
PROBLEM = make_problem(STRUCTURE)
Build = Callable[..., Sampler]
ROUGH = Rough(STRUCTURE)
ROUGH_PROBLEM = replace(PROBLEM, costs={**PROBLEM.costs, "rough": ROUGH}, objectives=("rough",))


def rough_ratio(ask: Ask) -> float:
    return float(ROUGH(ask.policy.array(STRUCTURE)))


@pytest.fixture(params=plugins.names("samplers"))
def build(request: pytest.FixtureRequest) -> Build:
    def make(problem: Problem = PROBLEM, seed: int = 0) -> Sampler:
        return build_sampler(request.param, problem, np.random.default_rng(seed), {})

    return make


def drive(sampler: Sampler, n: int, window: int = 1, structure: Structure = STRUCTURE) -> list[Ask]:
    """Ask and tell `n` times with `window` asks in flight."""
    evaluate = Hills(structure, fail_share=0.1)
    asks: list[Ask] = []
    for told in range(n):
        while len(asks) < min(n, told + window):
            asks.append(sampler.ask())
        try:
            sampler.tell(evaluate(asks[told]))
        except FloatingPointError as error:
            sampler.tell(Evaluation.failed(asks[told], str(error)))
    return asks


def test_every_proposal_is_on_the_grid_within_the_budget_and_on_the_fitness_samples(build: Build) -> None:
    bound = replace(PROBLEM, budget=replace(PROBLEM.budget, limits={"params": 0.6}))
    for ask in drive(build(bound), 14):
        ask.policy.check(STRUCTURE)
        assert PROBLEM.costs["macs"](ask.policy.array(STRUCTURE)) <= PROBLEM.budget.high
        assert PROBLEM.costs["params"](ask.policy.array(STRUCTURE)) <= 0.6
        assert (ask.tier, ask.split) == (PROBLEM.tier, "fitness")


def test_a_cost_that_is_not_monotone_is_kept_within_as_well(build: Build) -> None:
    seeds = tuple(replace(e, costs={**e.costs, "rough": rough_ratio(e.ask)}) for e in PROBLEM.seeds)
    budget = replace(PROBLEM.budget, cost="rough", low=0.4, limits={"params": 0.7})
    sampler = build(replace(ROUGH_PROBLEM, budget=budget, seeds=seeds))
    for _ in range(8):
        ask = sampler.ask()
        assert rough_ratio(ask) <= 0.9
        evaluation = Hills(STRUCTURE)(ask)
        sampler.tell(replace(evaluation, costs={**evaluation.costs, "rough": rough_ratio(ask)}))


def test_proposals_differ(build: Build) -> None:
    assert len({ask.policy for ask in drive(build(), 14)}) > 5


def test_the_same_seed_repeats_and_another_does_not(build: Build) -> None:
    first = drive(build(seed=1), 14, window=4)
    assert drive(build(seed=1), 14, window=4) == first
    assert drive(build(seed=2), 14, window=4) != first


def test_twenty_failures_in_a_row_are_survived(build: Build) -> None:
    sampler = build()
    for _ in range(20):
        sampler.tell(Evaluation.failed(sampler.ask(), "the loss is not finite"))
    assert len({ask.policy for ask in drive(sampler, 4)}) > 1


def test_the_global_random_state_is_left_alone(build: Build) -> None:
    drive(build(), 13)  # other packages may draw numbers while they are imported
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    expected = random.random(), float(np.random.random()), torch.rand(1).item()
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    drive(build(), 13)
    assert (random.random(), float(np.random.random()), torch.rand(1).item()) == expected


def test_killed_and_resumed_equals_never_killed(build: Build, tmp_path: Path) -> None:
    def run(folder: str) -> list[Evaluation]:
        with Record(tmp_path / folder, STRUCTURE, PROBLEM.objectives) as record:
            executor = Inline(MakeHills(STRUCTURE, fail_share=0.1))
            return list(search_loop(record, executor, build(), Asks(14), window=5))

    whole = run("whole")
    lines = (tmp_path / "whole" / JOURNAL).read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / JOURNAL).write_bytes(b"".join(lines[:11]) + lines[11][:40])
    assert [replace(e, seconds=0.0) for e in run("cut")] == [replace(e, seconds=0.0) for e in whole]


def test_a_budget_that_reaches_too_low_is_refused_or_kept_within(build: Build) -> None:
    low = replace(PROBLEM, budget=replace(PROBLEM.budget, low=0.0001))
    with contextlib.suppress(InputError):
        asks = drive(build(low), 6)
        assert all(PROBLEM.costs["macs"](ask.policy.array(STRUCTURE)) <= PROBLEM.budget.high for ask in asks)


def test_who_reads_the_table_or_seeds_declares_it(request: pytest.FixtureRequest, build: Build) -> None:
    declared = needs(request.node.callspec.params["build"], {})
    bare = replace(PROBLEM, table=PROBLEM.table if declared.table else None)
    bare = replace(bare, seeds=PROBLEM.seeds if declared.seeds else ())
    assert len(drive(build(bare), 3)) == 3


def test_no_seeds_are_needed(build: Build) -> None:
    assert len(drive(build(replace(PROBLEM, seeds=())), 6)) == 6


@pytest.mark.parametrize("space", SPARSE)
def test_groups_of_weights_are_proposed_on_their_grids_within_the_budget(build: Build, space: str) -> None:
    problem = sparse_problem(space)
    low = replace(problem, budget=replace(problem.budget, low=SPARSE[space][0], limits={"bytes": 0.8}))
    try:
        asks = drive(build(low, 1), 10, structure=problem.structure)
    except InputError as error:
        if "needs blocks" not in str(error):
            raise
        return
    for ask in asks:
        ask.policy.check(problem.structure)
        assert problem.costs["nonzeros"](ask.policy.array(problem.structure)) <= 0.9 + 1e-12
        assert problem.costs["bytes"](ask.policy.array(problem.structure)) <= 0.8 + 1e-12
    assert len({ask.policy for ask in asks}) > 4
    assert drive(build(low, 1), 10, structure=problem.structure) == asks
