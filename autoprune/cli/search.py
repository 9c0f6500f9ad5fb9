"""`autoprune search`: the front of a job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoprune.cli.asked import load_job, overrides, where
from autoprune.cli.interrupts import preparing
from autoprune.cli.options import (
    TRIALS_HELP,
    JobPath,
    JsonFlag,
    OutOption,
    RayOption,
    SetOption,
    TimeOption,
    WorkersOption,
)
from autoprune.cli.progress import follow
from autoprune.cli.tables import console, print_finetune, print_spent, print_summary, reference_words

if TYPE_CHECKING:
    from autoprune.run.run import Run


def search(  # noqa: PLR0913  # the options of the command line
    job: JobPath,
    out: OutOption = None,
    trials: Annotated[int | None, typer.Option(help=TRIALS_HELP)] = None,
    workers: WorkersOption = None,
    seed: Annotated[int | None, typer.Option(help="The seed of every random choice.")] = None,
    ray: RayOption = None,
    time_limit: TimeOption = None,
    warm_start: Annotated[
        Path | None, typer.Option(metavar="POLICY.json", help="A front whose points seed the search.")
    ] = None,
    set_: SetOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew instead of resuming.")] = False,
    json_: JsonFlag = False,
) -> dict[str, Any] | None:
    """Search for the front of loss versus cost; a second call with the same --out resumes."""
    flags = {
        "search.trials": trials,
        "search.seed": seed,
        "search.warm_start": None if warm_start is None else json.dumps(str(warm_start.resolve())),
        **where(workers, ray, time_limit),
    }
    the_job = load_job(job, [*(set_ or []), *overrides(flags)])

    from autoprune.run.run import run_of

    done = run_of(the_job, out=out, fresh=fresh)
    with preparing():
        follow(done, done.preparing(), console(json_))
    console(json_=True).print(done.needs, markup=False, highlight=False, soft_wrap=True)
    follow(done, done, console(json_))
    rows = [dict(row) for row in done.summary]
    tuned = _finetuned(done, json_) if the_job.finetune is not None else []
    if json_:
        extra: dict[str, Any] = {"finetune": tuned} if the_job.finetune is not None else {}
        extra |= {"price": list(done.price)} if done.price else {}
        return {"out": str(done.path), "points": len(done.front), "summary": rows, "spent": dict(done.spent), **extra}
    budget = the_job.budget.plain()
    print_summary(rows, (*the_job.objectives.costs, budget.cost, *budget.limits))
    print_spent(done.spent, done.setting.built_s)
    if tuned:
        print_finetune(tuned)
    names = ("policy.json", "front.csv", "report.html", "study.journal", "finetune.json")
    files = [name for name in names if (Path(done.path) / name).exists()]
    volume = done.front.provenance["hypervolume"]
    end = reference_words(volume["reference"])
    points = f"{len(done.front)} points on the front, hypervolume {volume['value']:.4g} ({end})"
    console(False).print(f"{points}; {done.path}: {', '.join(files)}", soft_wrap=True)
    return None


def _finetuned(done: Run, json_: bool) -> list[Mapping[str, Any]]:
    from autoprune.integrations.finetune import finetune_front

    out = console(json_)
    return list(finetune_front(done, lambda line: out.print(line, markup=False, highlight=False, soft_wrap=True)))
