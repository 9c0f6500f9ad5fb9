"""Searchers tried once on a problem: what would otherwise be found wrong after minutes of work."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from autoprune import plugins
from autoprune.allocation.sensitivity import blank_table
from autoprune.errors import AutopruneError, InputError
from autoprune.executors._watched import MEMBERS
from autoprune.files.job import Job
from autoprune.protocols import Problem
from autoprune.samplers import build_sampler
from autoprune.strategies import load_strategy, uses_table


def rehearse_sampler(name: str, problem: Problem, options: Mapping[str, Any], *, tabled: bool = True) -> None:
    """Build the sampler and ask it once; with `tabled` there will be a sensitivity table.

    Raises:
        InputError: it cannot be built with these options or for this problem, or its proposal is none.
    """
    blank = replace(problem, table=blank_table(problem.structure) if tabled else None)
    with plugins.before_work():
        build_sampler(name, blank, np.random.default_rng(0), options).ask()


def rehearse_strategy(name: str, problem: Problem) -> None:
    """Let the closed form answer at the asked budgets; its errors are its own."""
    strategy = load_strategy(name, problem.structure)
    blank = replace(problem, table=blank_table(problem.structure) if uses_table(name) else None)
    for budget in problem.budget.at:
        strategy(blank, budget)


def rehearse_executor(name: str, make: Any, given: int, options: Mapping[str, Any]) -> None:
    """InputError where `make` cannot be called with the `given` arguments of every executor and its options."""
    with plugins.before_work():
        try:
            inspect.signature(make).bind(*range(given), **options)
        except TypeError as error:
            raise plugins.broken("executors", name, f"cannot be built: {error}") from error
        plugins.check_has("executors", name, make, *MEMBERS)


def rehearse_recovery(job: Job) -> None:
    """InputError where the job's recovery, which comes last, is none or does not take its options."""
    plugins.build("recovery", job.recovery.schedule, job.options("recovery"), "recovery.options")


@contextmanager
def named(where: str, name: str) -> Iterator[None]:
    """Errors of a searcher as one line that says where it was asked for."""
    try:
        yield
    except AutopruneError as error:
        said = str(error) if name in str(error) else f"{name}: {error}"
        raise InputError(f"{where}: {said}") from error
