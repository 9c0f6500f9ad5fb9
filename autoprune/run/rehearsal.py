"""Searchers tried once on a problem: what would otherwise be found wrong after minutes of work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from autoprune.allocation.sensitivity import blank_table
from autoprune.errors import AutopruneError, InputError, one_line
from autoprune.protocols import Problem
from autoprune.samplers import build_sampler
from autoprune.strategies import load_strategy, uses_table


def rehearse_sampler(name: str, problem: Problem, options: Mapping[str, Any], *, tabled: bool = True) -> None:
    """Build the sampler and ask it once; with `tabled` there will be a sensitivity table.

    Raises:
        InputError: it cannot be built with these options or for this problem.
    """
    blank = replace(problem, table=blank_table(problem.structure) if tabled else None)
    build_sampler(name, blank, np.random.default_rng(0), options).ask()


def rehearse_strategy(name: str, problem: Problem) -> None:
    """Let the closed form answer at the asked budgets; its errors are its own."""
    strategy = load_strategy(name, problem.structure)
    blank = replace(problem, table=blank_table(problem.structure) if uses_table(name) else None)
    for budget in problem.budget.at:
        strategy(blank, budget)


@contextmanager
def named(where: str, name: str) -> Iterator[None]:
    """Errors of a searcher as one line that says where it was asked for."""
    try:
        yield
    except AutopruneError as error:
        raise InputError(f"{where}: {name}: {error}") from error
    except Exception as error:  # a user's own may fail in any way
        raise InputError(f"{where}: {name} cannot be used: {one_line(error)}") from error
