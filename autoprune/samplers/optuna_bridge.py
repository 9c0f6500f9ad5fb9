"""Any Optuna or OptunaHub sampler as one of ours, and the names random, tpe, nsga2, nsga3, gp, cmaes and qmc."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import TrialState

from autoprune import plugins
from autoprune.allocation.budget import Projector
from autoprune.allocation.loss_scale import loss_scale
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.policy import Policy
from autoprune.protocols import FloatArray, Problem, Sampler
from autoprune.record.storage import optuna_quiet

TARGET = "target"
"""The parameter that is the budget of a proposal."""


def knob(group: str) -> str:
    """The parameter that is the grid position of a group."""
    return f"width {group}"


class Knobs:
    """What a foreign optimiser turns, a grid position for each group and a budget target, and the policy they mean.

    `last` maps each parameter to its last position; positions keep the order of the widths.

    Raises:
        InputError: the narrowest budget is out of reach.
    """

    def __init__(self, problem: Problem) -> None:
        self._budget = problem.budget
        self._projector = Projector(problem.structure, problem.costs)
        self._projector.check({**problem.budget.limits, problem.budget.cost: problem.budget.low})
        names = (knob(group) for group in problem.structure.names)
        self.last = dict(zip(names, self._projector.codec.last.tolist(), strict=True))

    def policy(self, values: Mapping[str, Any]) -> Policy:
        """The positions, projected onto their target and the budget's limits."""
        codec = self._projector.codec
        positions = np.array([values[name] for name in self.last], dtype=np.int64)
        limits = {**self._budget.limits, self._budget.cost: float(values[TARGET])}
        return self._projector.project(codec.ratios(codec.widths(positions)), limits)


class Bridge:
    """Asks `sampler` for a grid position for every group and one budget target; the policy is their projection.

    The private in-memory study sees the whole ask/tell sequence and nothing else: samplers that keep state in system
    attributes (NSGA, CMA-ES, QMC) degrade when they are fed finished trials. It minimises (log loss, costs...), or,
    for a sampler of one objective, the log loss relative to that of the seeds at the same cost.
    """

    def __init__(self, problem: Problem, sampler: BaseSampler, multi_objective: bool = True) -> None:
        self._problem = problem
        self._knobs = Knobs(problem)
        self._space: dict[str, BaseDistribution] = {n: IntDistribution(0, last) for n, last in self._knobs.last.items()}
        self._space[TARGET] = FloatDistribution(problem.budget.low, problem.budget.high)
        self._log = loss_scale(problem)
        self._multi_objective = multi_objective
        self._reference = _reference(problem, self._log)
        self._trials: deque[optuna.Trial] = deque()
        n_objectives = 1 + len(problem.objectives) if multi_objective else 1
        with optuna_quiet():
            self._study = optuna.create_study(directions=[StudyDirection.MINIMIZE] * n_objectives, sampler=sampler)

    def ask(self) -> Ask:
        """The next proposal, projected onto its own target."""
        try:
            with optuna_quiet():
                trial = self._study.ask(fixed_distributions=self._space)
        except TypeError as error:  # of an option that Optuna does not look at before it needs it
            raise InputError(f"search.options: the sampler cannot ask: {error}") from error
        except ValueError as error:
            hint = "samplers of one objective take options: {multi_objective: false}"
            raise InputError(f"search.sampler: {error} ({hint})") from error
        self._trials.append(trial)
        return Ask(self._knobs.policy(trial.params), self._problem.tier)

    def tell(self, evaluation: Evaluation) -> None:
        """Answer the oldest open ask."""
        trial = self._trials.popleft()
        with optuna_quiet():
            if evaluation.ok:
                self._study.tell(trial, self._values(evaluation))
            else:
                self._study.tell(trial, state=TrialState.FAIL)

    def _values(self, evaluation: Evaluation) -> list[float]:
        value = self._log(evaluation.loss)
        if self._multi_objective:
            return [value, *(evaluation.costs[c] for c in self._problem.objectives)]
        costs, values = self._reference
        return [value - float(np.interp(evaluation.costs[self._problem.budget.cost], costs, values))]


def bridged(
    make: Callable[..., BaseSampler], problem: Problem, rng: np.random.Generator, options: Mapping[str, Any]
) -> Sampler:
    """A user's Optuna sampler class, built with `options` and, where it takes one, a seed.

    The option `multi_objective` (default true) is ours: false gives the sampler one objective.
    """
    return _named(make, {}, problem, rng, **options)


def _make(make: Callable[..., BaseSampler], rng: np.random.Generator, options: Mapping[str, Any]) -> BaseSampler:
    plugins.check_options(make, options, 0, "search.options")
    parameters = inspect.signature(make).parameters.values()
    seeded = any(p.name == "seed" or p.kind is p.VAR_KEYWORD for p in parameters)
    seed = {"seed": int(rng.integers(2**31 - 1))} if seeded else {}
    with optuna_quiet():
        return make(**{**seed, **options})


def uses(options: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a bridged sampler wants the sensitivity table (never) and seeds (with one objective)."""
    return False, options.get("multi_objective") is False


def _named(
    make: Callable[..., BaseSampler],
    fixed: Mapping[str, Any],
    problem: Problem,
    rng: np.random.Generator,
    /,  # whatever an option of the user's is called, it is not one of these
    *,
    multi_objective: bool = True,
    **options: Any,
) -> Sampler:
    return Bridge(problem, _make(make, rng, {**fixed, **options}), multi_objective)


def _single(
    make: Callable[..., BaseSampler],
    fixed: Mapping[str, Any],
    problem: Problem,
    rng: np.random.Generator,
    /,
    **options: Any,
) -> Sampler:
    return Bridge(problem, _make(make, rng, {**fixed, **options}), multi_objective=False)


def _of_several(make: Callable[..., BaseSampler], fixed: Mapping[str, Any]) -> Callable[..., Sampler]:
    """A sampler of several objectives, or by its option of one."""
    built = partial(_named, make, fixed)
    built.uses = uses  # type: ignore[attr-defined]  # an object like any other
    return cast("Callable[..., Sampler]", built)


def _of_one_objective(make: Callable[..., BaseSampler], fixed: Mapping[str, Any]) -> Callable[..., Sampler]:
    """A sampler of one objective, which works from the seeds."""
    built = partial(_single, make, fixed)
    built.uses_seeds = built.one_objective = True  # type: ignore[attr-defined]
    return cast("Callable[..., Sampler]", built)


def _reference(problem: Problem, log: Callable[[float], float]) -> tuple[FloatArray, FloatArray]:
    """(costs ascending, log loss) of the best seed at each cost; a flat zero where there are no seeds."""
    best: dict[float, float] = {}
    for seed in problem.seeds:
        if seed.ok:
            cost = seed.costs[problem.budget.cost]
            best[cost] = min(log(seed.loss), best.get(cost, np.inf))
    costs = sorted(best) or [0.0]
    return np.array(costs), np.array([best.get(c, 0.0) for c in costs])


_QUIET_QMC = {"scramble": True, "warn_independent_sampling": False, "warn_asynchronous_seeding": False}

SAMPLERS: Mapping[str, Callable[..., Sampler]] = {
    name: _of_several(make, fixed)
    for name, make, fixed in (
        ("random", optuna.samplers.RandomSampler, {}),
        ("tpe", optuna.samplers.TPESampler, {}),
        ("nsga2", optuna.samplers.NSGAIISampler, {}),
        ("nsga3", optuna.samplers.NSGAIIISampler, {}),
        ("gp", optuna.samplers.GPSampler, {"warn_independent_sampling": False}),
        ("qmc", optuna.samplers.QMCSampler, _QUIET_QMC),
    )
} | {"cmaes": _of_one_objective(optuna.samplers.CmaEsSampler, {"warn_independent_sampling": False})}
