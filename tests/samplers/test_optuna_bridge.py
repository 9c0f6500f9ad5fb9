"""Any Optuna sampler is one of ours: by module and class, with its own options, of one objective or several."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest

from autoprune.errors import InputError, PluginError
from autoprune.evaluation import Evaluation
from autoprune.protocols import Problem
from autoprune.samplers import build_sampler
from tests.synthetic import Hills, chain, make_problem


class Seedless(optuna.samplers.RandomSampler):
    """A user's sampler that takes no seed."""

    def __init__(self) -> None:
        super().__init__(seed=3)


class AnyOption(optuna.samplers.RandomSampler):
    """A user's sampler that passes its options on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)


class Demanding(optuna.samplers.RandomSampler):
    """A user's sampler with an option that has no default."""

    def __init__(self, depth: int) -> None:
        super().__init__(seed=depth)


class Broken:
    """A user's own sampler that cannot be built, whatever the options."""

    def __init__(self, problem: Problem, rng: np.random.Generator, *, depth: int = 3) -> None:
        raise TypeError("broken")


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


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("nsga2", {"population_size": 0}, ".*population_size"),
        ("optuna.samplers:NSGAIISampler", {"population_size": 0}, ".*population_size"),
        ("evolution", {"fractions": 0.5}, ".*not iterable"),
        ("evolution", {"fractions": ["abc", 1]}, ".*'abc'"),
        ("spdy", {"sigma": "x"}, ".*'str'"),
        (f"{__name__}:Demanding", {}, ".*'depth'"),
        (f"{__name__}:Broken", {"depth": 4}, "broken"),
    ],
)
def test_a_value_that_a_sampler_refuses_is_one_line(name: str, options: dict[str, Any], reason: str) -> None:
    said = re.escape(f"search.options: the sampler {name} refuses {options}: ")
    with pytest.raises(InputError, match=f"^{said}{reason}"):
        build_sampler(name, PROBLEM, np.random.default_rng(0), options)


def test_what_a_sampler_says_of_its_options_stays_and_without_options_they_are_not_blamed() -> None:
    with pytest.raises(InputError, match=r"^search\.options\.sigma must be a positive number, not -1$"):
        build_sampler("spdy", PROBLEM, np.random.default_rng(0), {"sigma": -1})
    with pytest.raises(PluginError, match=r"Broken fails while it is built: TypeError: broken; it must be a class S\("):
        build_sampler(f"{__name__}:Broken", PROBLEM, np.random.default_rng(0), {})


def test_an_optuna_sampler_gets_a_seed_only_where_it_takes_one() -> None:
    assert drive(f"{__name__}:Seedless", {}, 5) == drive("random", {"seed": 3}, 5)
    assert drive(f"{__name__}:AnyOption", {}, 5) == drive("random", {}, 5)


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
    values = [t.value for t in sampler.sampler._study.trials]  # type: ignore[attr-defined]
    assert values == pytest.approx([0.0, np.log(2.0)], abs=0.02)
