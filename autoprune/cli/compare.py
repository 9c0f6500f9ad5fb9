"""`autoprune compare`: strategies and samplers side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from autoprune.cli.asked import load_job, overrides, ratio, where, words
from autoprune.cli.interrupts import preparing
from autoprune.cli.options import (
    STRATEGIES_HELP,
    JobPath,
    JsonFlag,
    OutOption,
    RayOption,
    SetOption,
    TimeOption,
    WorkersOption,
)
from autoprune.cli.progress import follow
from autoprune.cli.tables import console, print_comparison, shown


def compare(  # noqa: PLR0913  # the options of the command line
    job: JobPath,
    strategies: Annotated[str | None, typer.Option(help=STRATEGIES_HELP)] = None,
    budgets: Annotated[str | None, typer.Option(help="Ratios to dense, with commas; the job's by default.")] = None,
    seeds: Annotated[str, typer.Option(help="How many seeds, as in 3, or which, as in 0,1,2.")] = "3",
    out: OutOption = None,
    workers: WorkersOption = None,
    ray: RayOption = None,
    time_limit: TimeOption = None,
    set_: SetOption = None,
    json_: JsonFlag = False,
) -> dict[str, Any] | None:
    """Run strategies and samplers at the same budgets and seeds, side by side.

    Every sampler gets an equal ledger, the job's trials, at each seed. Writes compare.csv, compare.json and
    compare.html; finished arms (one strategy at one seed) are kept, so that the same command goes on.

    Each is judged against the last control arm (compare.controls) over samples and seeds: only a difference whose 95 %
    interval excludes 0 counts.
    """
    the_job = load_job(job, [*(set_ or []), *overrides(where(workers, ray, time_limit))])
    asked = None if budgets is None else tuple(ratio(b) for b in words(budgets))

    from autoprune.comparison.checks import parse_seeds
    from autoprune.comparison.comparison import Comparison

    names = None if strategies is None else words(strategies)
    with preparing():
        comparison = Comparison(the_job, names, asked, parse_seeds(seeds), out)
        follow(comparison, comparison.preparing(), console(json_=True))
    follow(comparison, comparison, console(json_=True))
    if comparison.kept:
        console(json_=True).print(f"{comparison.kept} of {comparison.n_arms} arms were finished before")
    if json_:
        return comparison.document
    document = comparison.document  # drives it to its end
    console().print(f"{comparison.path}: compare.csv, compare.html, compare.json", soft_wrap=True)
    return shown(print_comparison, document)
