"""Any Optuna sampler is one of ours: by module and class, with its own options, of one objective or several."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest
from synthetic import Hills, chain, make_problem

from autoprune.errors import InputError
from autoprune.evaluation import Evaluation
from autoprune.protocols import Problem
from autoprune.samplers import build_sampler

STRUCTURE = chain(4)
PROBLEM = make_problem(STRUCTURE)


def drive(name: str, options: dict[str, Any], n: int, problem: Problem = PROBLEM) -> list[Evaluation]:
    sampler = build_sampler(name, problem, np.random.default_rng(0), options)
    told = []
    for _ in range(n):
        told.append(Hills(STRUCTURE)(sampler.ask()))
        sampler.tell(told[-1])
    return told


def test_an_optuna_class_is_bridged_and_equals_its_short_name() -> None:
    assert drive("optuna.samplers:TPESampler", {}, 15) == drive("tpe", {}, 15)


def test_a_sampler_of_one_objective_says_so_and_takes_the_option() -> None:
    with pytest.raises(InputError, match=r"multi_objective: false"):
        drive("optuna.samplers:CmaEsSampler", {}, 2)
    told = drive("optuna.samplers:CmaEsSampler", {"multi_objective": False, "warn_independent_sampling": False}, 12)
    assert len({e.ask.policy for e in told}) > 6


def test_a_short_name_takes_the_option_too() -> None:
    alone = {"multi_objective": False}
    assert drive("tpe", alone, 15) == drive("optuna.samplers:TPESampler", alone, 15)
    with pytest.raises(InputError, match="unknown option 'multi_objective'"):
        drive("cmaes", {"multi_objective": True}, 1)


@pytest.mark.parametrize("name", ["cmaes", "spdy", "amc"])
def test_what_minimises_the_loss_at_one_cost_refuses_several(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} minimises the loss at one cost, not 2 \(macs, params\)"):
        build_sampler(name, replace(PROBLEM, objectives=("macs", "params")), np.random.default_rng(0), {})


def test_options_reach_the_optuna_sampler() -> None:
    assert drive("tpe", {"n_startup_trials": 3}, 12) != drive("tpe", {"n_startup_trials": 12}, 12)


@pytest.mark.parametrize("name", ["tpe", "optuna.samplers:TPESampler"])
def test_an_unknown_option_names_the_nearest(name: str) -> None:
    with pytest.raises(InputError, match="unknown option 'n_startup_trails'; did you mean 'n_startup_trials'"):
        build_sampler(name, PROBLEM, np.random.default_rng(0), {"n_startup_trails": 3})


@pytest.mark.parametrize("name", ["tpe", "cmaes", "optuna.samplers:TPESampler"])
@pytest.mark.parametrize("option", ["problem", "rng", "make", "fixed"])
def test_an_option_that_is_called_as_a_parameter_of_ours_is_unknown_too(name: str, option: str) -> None:
    with pytest.raises(InputError, match=f"unknown option '{option}'"):
        build_sampler(name, PROBLEM, np.random.default_rng(0), {option: 3})


def test_an_unknown_option_of_our_own_sampler_names_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown option 'fraction'; did you mean 'fractions'"):
        build_sampler("evolution", PROBLEM, np.random.default_rng(0), {"fraction": 3})


def test_a_value_that_optuna_refuses_is_one_line() -> None:
    with pytest.raises(InputError, match=r"the sampler refuses .*population_size"):
        build_sampler("nsga2", PROBLEM, np.random.default_rng(0), {"population_size": 0})


def test_several_costs_are_several_objectives() -> None:
    problem = replace(PROBLEM, objectives=("macs", "params"))
    sampler = build_sampler("nsga2", problem, np.random.default_rng(0), {})
    for _ in range(5):
        evaluation = Hills(STRUCTURE)(sampler.ask())
        params = float(PROBLEM.costs["params"](evaluation.ask.policy.array(STRUCTURE)))
        sampler.tell(replace(evaluation, costs={**evaluation.costs, "params": params}))


def test_optuna_keeps_its_verbosity_and_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    optuna.logging.set_verbosity(logging.INFO)
    drive("gp", {"n_startup_trials": 2}, 3)
    assert optuna.logging.get_verbosity() == logging.INFO
    assert capfd.readouterr() == ("", "")


def test_one_objective_is_the_log_loss_relative_to_the_seeds_at_that_cost() -> None:
    seeds = tuple(replace(s, loss=np.exp(-3 * s.costs["macs"])) for s in PROBLEM.seeds)
    sampler = build_sampler("cmaes", replace(PROBLEM, seeds=seeds), np.random.default_rng(0), {})
    for factor in (1.0, 2.0):
        ask = sampler.ask()
        cost = float(PROBLEM.costs["macs"](ask.policy.array(STRUCTURE)))
        sampler.tell(Evaluation(ask, factor * np.exp(-3 * cost), {"macs": cost}))
    values = [t.value for t in sampler._study.trials]  # type: ignore[attr-defined]
    assert values == pytest.approx([0.0, np.log(2.0)], abs=0.02)
