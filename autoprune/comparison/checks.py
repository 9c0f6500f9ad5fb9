"""What `compare` is asked for, checked before anything is searched: names, budgets, seeds, and whether all fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoprune import plugins
from autoprune.allocation.budget import Projector
from autoprune.errors import InputError, did_you_mean
from autoprune.evaluation import Tier
from autoprune.files.job import Job, changed_keys
from autoprune.files.job_parts import ComparePart
from autoprune.protocols import Problem
from autoprune.run.rehearsal import named, rehearse_sampler, rehearse_strategy

MAY_DIFFER = ("budget.at", "compare.controls")
"""Keys that arms do not share, beside those that any search may change when it resumes."""


DEFAULT_SAMPLER = "evolution"


def asked_names(strategies: str | Sequence[str] | None, job: Job) -> tuple[str, ...]:
    """The names to compare: those asked for, with the control arms that the job itself names before them.

    Where nothing is asked for, the control arms and the house's sampler.
    """
    controls, strategies = job.compare.controls, (strategies,) if isinstance(strategies, str) else strategies
    if strategies is None:
        return (*controls, DEFAULT_SAMPLER)
    own = controls if controls != ComparePart().controls else ()
    return (*(name for name in own if name not in strategies), *strategies) if strategies else ()


def checked_names(strategies: Sequence[str]) -> tuple[str, ...]:
    """The names without repeats; InputError where there are none or one is unknown."""
    _check_items("--strategies", strategies, str, "names, as in uniform,evolution")
    known = (*plugins.names("strategies"), *plugins.names("samplers"))
    for name in strategies:
        if ":" not in name and name not in known:
            raise InputError(f"--strategies: unknown name {name!r}; {did_you_mean(name, known)}")
    if not strategies:
        raise InputError(f"--strategies: compare needs at least one strategy or sampler; allowed: {', '.join(known)}")
    return tuple(dict.fromkeys(strategies))


def checked_budgets(budgets: float | Sequence[float]) -> tuple[float, ...]:
    """The budgets without repeats; InputError where there are none or one is no ratio."""
    budgets = (budgets,) if isinstance(budgets, int | float) else budgets
    _check_items("--budgets", budgets, int | float, "ratios to dense, as in 0.7,0.5,0.3")
    for budget in budgets:
        if not (math.isfinite(budget) and 0.0 < budget <= 1.0):
            raise InputError(f"--budgets: {budget:g} is no ratio to dense; it must be above 0 and at most 1")
    if not budgets:
        raise InputError("--budgets: compare needs at least one budget, as in 0.7,0.5,0.3")
    return tuple(dict.fromkeys(float(b) for b in budgets))


def checked_seeds(seeds: int | Sequence[int], first: int) -> tuple[int, ...]:
    """The seeds themselves: so many from `first` on, or those of the list; InputError where there are none."""
    _check_items("--seeds", (seeds,) if isinstance(seeds, int) else seeds, int, "whole numbers, as in 3 or 0,1,2")
    asked = range(first, first + max(seeds, 0)) if isinstance(seeds, int) else tuple(dict.fromkeys(seeds))
    if not asked or min(asked) < 0:
        raise InputError("--seeds: compare needs at least one seed, as in 3 (so many) or 0,1,2 (these), none negative")
    return tuple(asked)


def _check_items(where: str, given: object, kind: Any, wanted: str) -> None:
    """InputError unless `given` is a list of values of `kind`."""
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    wrong = [x for x in given if not isinstance(x, kind) or isinstance(x, bool)] if listed else [given]  # type: ignore[attr-defined]
    if wrong:
        raise InputError(f"{where} takes {wanted}, not {wrong[0]!r}")


def parse_seeds(text: str) -> int | tuple[int, ...]:
    """So many seeds for "3", these ones for "0,1,2" or "7,"; InputError for anything else."""
    words = [word.strip() for word in text.split(",")]
    try:
        if len(words) == 1:
            return int(words[0])
        return tuple(int(word) for word in words if word)
    except ValueError:
        raise InputError(f"--seeds takes a number, as in 3, or a list, as in 0,1,2 or 7, (not {text!r})") from None


def same_job(folder: Path, job: Job) -> Job:
    """The job as the comparison in `folder` goes on with it.

    Raises:
        InputError: it differs (names the keys).
    """
    if not (folder / "job.yaml").exists():
        return job
    before = Job.load(folder / "job.yaml")
    job = job.continuing(before)
    keys = [key for key in changed_keys(before, job) if key not in MAY_DIFFER]
    if keys:
        raise InputError(
            f"{folder} holds a comparison of another job: {', '.join(keys)} differ; trials may grow, strategies, "
            f"budgets, seeds and executor.* may change, for anything else choose another --out"
        )
    return job


def check_reach(problem: Problem, budgets: Sequence[float]) -> None:
    """InputError with the reachable range where the widths cannot get down to a budget."""
    projector = Projector(problem.structure, problem.costs)
    for budget in budgets:
        projector.check({problem.budget.cost: budget, **problem.budget.limits})


def check_fits(name: str, problem: Problem, options: Mapping[str, Any]) -> None:
    """InputError where a strategy cannot answer at a budget, or a sampler cannot be built and asked."""
    with named("--strategies", name):
        if is_closed_form(name):
            rehearse_strategy(name, problem)
        else:
            rehearse_sampler(name, problem, options)


def is_closed_form(name: str) -> bool:
    """Whether `name` is a strategy (a function) and not a sampler (a class, where it is a user's own)."""
    return not isinstance(plugins.load_object(name), type) if ":" in name else name in plugins.names("strategies")


def at_budgets(job: Job, budgets: Sequence[float]) -> Job:
    """The job asked at these budgets, its range wide enough for them, without tuned finalists, recorded in files."""
    plain, budget = job.plain(), job.budget.plain()
    plain.pop("compare", None)  # what an arm is judged against changes no figure of it
    plain.pop("storage", None)  # an arm is named by its whole path, a study in a database by the run's name alone
    span = [min(budget.low, *budgets), max(budget.high, *budgets)]
    plain["budget"] = {**plain["budget"], budget.cost: span, "at": list(budgets)}
    plain["evaluator"] = {**plain["evaluator"], "finalists": 0}
    return _again(job, plain)


def at_tier(job: Job, tier: Tier) -> Job:
    """The job with its fitness tier fixed, so that all arms are searched and judged at the same one."""
    plain = job.plain()
    plain["evaluator"] = {**plain["evaluator"], "fitness": tier}
    return _again(job, plain)


def at_seed(job: Job, seed: int, sampler: str | None = None) -> Job:
    """The job at one seed, and for one of the compared samplers."""
    plain, name = job.plain(), sampler or job.search.sampler
    plain["search"] = {**plain["search"], "seed": seed, "sampler": name, "options": options_of(job, name)}
    return _again(job, plain)


def options_of(job: Job, sampler: str) -> dict[str, Any]:
    """The job's options where they are this sampler's."""
    return job.options("search") if sampler == job.search.sampler else {}


def _again(job: Job, plain: Mapping[str, Any]) -> Job:
    return Job.from_dict(plain, source=job.name)
