"""`autoprune inspect`: what of a model can be pruned, and what each group alone costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoprune.cli.asked import load_job
from autoprune.cli.options import JobPath, JsonFlag, OutOption, SetOption
from autoprune.cli.progress import follow
from autoprune.cli.tables import console, print_inspect, shown

if TYPE_CHECKING:
    from autoprune.files.job import Job


def inspect(
    job: JobPath,
    sensitivity: Annotated[
        bool,
        typer.Option("--sensitivity", help="Measure, print and plot what each group alone costs; search re-uses it."),
    ] = False,
    out: OutOption = None,
    json_: JsonFlag = False,
    set_: SetOption = None,
) -> dict[str, Any] | None:
    """Show groups, widths, their share of the MACs, and what is frozen and why."""
    from autoprune.deploy import check_model, held_words, searched
    from autoprune.families import analysed
    from autoprune.run.inspection import inspect_facts
    from autoprune.run.prepare import settings_of
    from autoprune.run.setting import idle_words
    from autoprune.run.timed import runtime_step, step_words

    the_job = load_job(job, set_)
    if sensitivity:
        facts = _sensitivity(the_job, out, json_)
    else:
        task = the_job.build_task()
        model = task.build()
        check_model(model, the_job.deploy)
        found = analysed(model, task.example_inputs(), kinds=the_job.space.kinds)
        step = runtime_step(the_job, settings_of(the_job).torch_device)
        structure = searched(found.structure, the_job.search_space(), the_job.deploy, step)
        facts = inspect_facts(structure, task)
        facts["said"] = [*filter(None, (found.said, step_words(the_job, step), idle_words(the_job)))]
    facts["said"] += filter(None, [held_words(the_job.deploy)])
    return facts if json_ else shown(print_inspect, facts)


def _sensitivity(job: Job, out: Path | None, json_: bool) -> dict[str, Any]:
    """The facts of `inspect` with the sensitivity table, of one analysis."""
    from autoprune.report.sensitivity import build_sensitivity
    from autoprune.run.inspection import Inspection
    from autoprune.run.setting import idle_words

    folder = Path("runs") / job.name if out is None else out
    inspection = Inspection(job, folder)
    follow(inspection, inspection.preparing(), console(json_))
    follow(inspection, inspection, console(json_))
    predicted, cost = inspection.predicted(), job.budget.plain().cost
    plot = build_sensitivity(inspection.table, predicted, cost, folder / "sensitivity.html", job.name)
    rows = [{"ratio": ratio, "loss": loss} for ratio, loss in predicted]
    files = {"file": str(inspection.path), "plot": str(plot)}
    table = {"table": inspection.table, "cost": cost, "predicted": rows, **files}
    return {**inspection.facts(), "sensitivity": table, "said": [*inspection.said, *filter(None, [idle_words(job)])]}
