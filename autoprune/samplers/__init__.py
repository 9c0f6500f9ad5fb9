"""Samplers: propose policies one at a time; each is one file. Here is how one is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from autoprune import plugins
from autoprune.errors import AutopruneError, InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.protocols import Problem, Sampler
from autoprune.structure import Structure


def build_sampler(name: str, problem: Problem, rng: np.random.Generator, options: Mapping[str, Any]) -> Sampler:
    """The sampler called `name`; "module:Class" may also be an Optuna or OptunaHub sampler, which is then bridged.

    A sampler that declares `one_objective` minimises the loss at the budget's cost. What it proposes is looked at.

    Raises:
        InputError: no such sampler, or it does not take these options or their values, or not so many objectives.
        PluginError: it fails, now or later, or does not do what a sampler must.
    """
    make = plugins.load("samplers", name)
    if getattr(make, "one_objective", False) and len(problem.objectives) > 1:
        raise InputError(
            f"search.sampler: {name} minimises the loss at one cost, not {len(problem.objectives)} "
            f"({', '.join(problem.objectives)}); take evolution, nsga2, nsga3 or tpe, or name one in objectives.costs"
        )
    optunas = _is_optunas(make)
    # without options nothing that the user wrote is wrong; Optuna's may lack one
    about_options = (TypeError, ValueError) if options or optunas else ()
    try:
        with plugins.calling("samplers", name, spared=(AutopruneError, *about_options)):
            sampler = _bridged(make, problem, rng, options) if optunas else _made(make, problem, rng, options)
    except about_options as error:
        raise InputError(f"search.options: the sampler {name} refuses {dict(options)}: {error}") from error
    plugins.check_has("samplers", name, sampler, "ask", "tell")
    return Watched(name, sampler, problem.structure, spared=(AutopruneError,) if optunas else ())


@dataclass(frozen=True)
class Watched:
    """The sampler called `name`, whose mistakes name it: what it raises but for `spared`, proposals off the grids."""

    name: str
    sampler: Sampler
    structure: Structure
    spared: tuple[type[Exception], ...] = ()

    def ask(self) -> Ask:
        """Its next proposal."""
        with plugins.calling("samplers", self.name, "in ask()", self.spared):
            ask = self.sampler.ask()
            if not isinstance(ask, Ask):
                raise TypeError(f"it proposes a {type(ask).__name__}, not an Ask")
            if ask.split != "fitness":
                raise ValueError(f"it asks for the {ask.split} samples, which judge the search")
            ask.policy.check(self.structure)
        return ask

    def tell(self, evaluation: Evaluation) -> None:
        """Pass the answer on."""
        with plugins.calling("samplers", self.name, "in tell()", self.spared):
            self.sampler.tell(evaluation)


@dataclass(frozen=True)
class Needs:
    """What a sampler works from beside the problem's numbers: the sensitivity table, evaluated seeds."""

    table: bool
    seeds: bool


def needs(name: str, options: Mapping[str, Any]) -> Needs:
    """What the sampler called `name` declares as `uses_table` and `uses_seeds`, or by `uses(options)`; else nothing."""
    make = plugins.load("samplers", name)
    if hasattr(make, "uses"):
        return Needs(*make.uses(options))
    if _is_optunas(make):
        from autoprune.samplers.optuna_bridge import uses

        return Needs(*uses(options))
    return Needs(bool(getattr(make, "uses_table", False)), bool(getattr(make, "uses_seeds", False)))


def _made(make: Any, problem: Problem, rng: np.random.Generator, options: Mapping[str, Any]) -> Sampler:
    plugins.check_options(make, options, 2, "search.options")
    return cast(Sampler, make(problem, rng, **plugins.with_paths(make, options)))


def _bridged(make: Any, problem: Problem, rng: np.random.Generator, options: Mapping[str, Any]) -> Sampler:
    from autoprune.samplers.optuna_bridge import bridged

    return bridged(make, problem, rng, options)


def _is_optunas(make: Any) -> bool:
    """Whether it is an Optuna sampler's class, told by name: nothing of Optuna is imported for it."""
    return isinstance(make, type) and any(base.__qualname__ == "BaseSampler" for base in make.__mro__)
