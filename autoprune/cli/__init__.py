"""The command line: inspect, search, compare, apply, report. The only place that prints or exits."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import webbrowser
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoprune.cli.options import (
    EXPORT_HELP,
    STRATEGIES_HELP,
    TRIALS_HELP,
    AtOption,
    CriterionOption,
    DeployOption,
    FinetuneOption,
    Int8Flag,
    JobPath,
    JsonFlag,
    ModelOption,
    OutOption,
    RayOption,
    RecoveryOption,
    SetOption,
    TaskOption,
    TimeOption,
    TransferFlag,
    WeightsOption,
    WorkersOption,
)
from autoprune.cli.progress import follow
from autoprune.cli.tables import (
    console,
    print_applied,
    print_comparison,
    print_finetune,
    print_inspect,
    print_spent,
    print_summary,
    reference_words,
)
from autoprune.errors import AutopruneError, InputError
from autoprune.version import __version__

if TYPE_CHECKING:
    from autoprune.files.job import Job
    from autoprune.run.run import Run

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}
INTERRUPTED = "interrupted; the same command goes on where it stopped"
TOO_EARLY = "interrupted while the run was prepared, before its first evaluation; the same command starts it"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 wrong input, 3 the run failed, 130 interrupted and resumable."""
    code = run(sys.argv[1:] if arguments is None else arguments)
    sys.stdout.flush()
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """The exit code of the command line for `arguments`; every error is one line on stderr, never a traceback."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # so that a job's "module:function" finds modules beside the user
    command = typer.main.get_command(app)
    aside = contextlib.redirect_stdout(sys.stderr) if "--json" in arguments else contextlib.nullcontext()
    try:
        with aside:  # whatever a user's model prints, stdout is one document
            code = command.main(list(arguments) or ["--help"], prog_name="autoprune", standalone_mode=False)
    except KeyboardInterrupt:
        return _say(INTERRUPTED, 130)
    except SystemExit as leaving:  # typer turns an interrupt into this
        return _say(INTERRUPTED, 130) if leaving.code == 130 else _exit_code(leaving.code)
    except _TooEarlyError as error:
        return _say(str(error), 130)
    except AutopruneError as error:
        if error.__cause__ is not None and os.environ.get("AUTOPRUNE_DEBUG"):  # a plug-in's author looks for the line
            raise
        return _say(str(error), 2 if isinstance(error, InputError) else 3)
    except Exception as error:
        if os.environ.get("AUTOPRUNE_DEBUG"):
            raise
        return _say(*_explain(error))
    if code == 130:  # or into this, by version
        return _say(INTERRUPTED, 130)
    return _exit_code(code)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"autoprune {__version__}")
        raise typer.Exit


@app.callback()
def autoprune(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Search how much each layer of a neural network should be pruned."""


@app.command()
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

    the_job = _load(job, set_)
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
    return facts if json_ else _shown(print_inspect, facts)


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


@app.command()
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
        **_where(workers, ray, time_limit),
    }
    the_job = _load(job, [*(set_ or []), *_overrides(flags)])

    from autoprune.run.run import run_of

    done = run_of(the_job, out=out, fresh=fresh)
    with _preparing():
        follow(done, done.preparing(), console(json_))
    console(json_=True).print(done.needs, markup=False, highlight=False, soft_wrap=True)
    follow(done, done, console(json_))
    rows = [dict(row) for row in done.summary]
    tuned = _finetuned(done, json_) if the_job.finetune is not None else []
    if json_:
        extra: dict[str, Any] = {"finetune": tuned} if the_job.finetune is not None else {}
        extra |= {"price": list(done.price)} if done.price else {}
        return {"out": str(done.path), "points": len(done.front), "summary": rows, "spent": dict(done.spent), **extra}
    print_summary(rows, (*the_job.objectives.costs, *the_job.budget.plain().limits))
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


def _where(workers: int | None, ray: str | None, time_limit: str | None) -> dict[str, object]:
    """The keys of a job that say where, and how long, it searches."""
    return {
        "executor.workers": workers,
        **({} if ray is None else {"executor.kind": "ray", "executor.address": json.dumps(ray)}),
        "search.time_limit_s": None if time_limit is None else _seconds(time_limit),
    }


def _overrides(flags: Mapping[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in flags.items() if value is not None]


class _TooEarlyError(AutopruneError):
    """Ctrl-C before anything was evaluated: there is nothing to go on from."""


@contextlib.contextmanager
def _preparing() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise _TooEarlyError(TOO_EARLY) from None


def _finetuned(done: Run, json_: bool) -> list[Mapping[str, Any]]:
    from autoprune.integrations.finetune import finetune_front

    out = console(json_)
    return list(finetune_front(done, lambda line: out.print(line, markup=False, highlight=False, soft_wrap=True)))


@app.command()
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
    the_job = _load(job, [*(set_ or []), *_overrides(_where(workers, ray, time_limit))])
    asked = None if budgets is None else tuple(_ratio(b) for b in _words(budgets))

    from autoprune.comparison.checks import parse_seeds
    from autoprune.comparison.comparison import Comparison

    names = None if strategies is None else _words(strategies)
    with _preparing():
        comparison = Comparison(the_job, names, asked, parse_seeds(seeds), out)
        follow(comparison, comparison.preparing(), console(json_=True))
    follow(comparison, comparison, console(json_=True))
    if comparison.kept:
        console(json_=True).print(f"{comparison.kept} of {comparison.n_arms} arms were finished before")
    if json_:
        return comparison.document
    document = comparison.document  # drives it to its end
    console().print(f"{comparison.path}: compare.csv, compare.html, compare.json", soft_wrap=True)
    return _shown(print_comparison, document)


@app.command()
def apply(  # noqa: PLR0913  # the options of the command line
    policy: Annotated[Path, typer.Argument(metavar="POLICY.json", help="A front that search wrote.")],
    at: AtOption,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to write; a folder a point for several.")],
    task: TaskOption = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    finetune: FinetuneOption = None,
    finetune_epochs: Annotated[float | None, typer.Option(help="Epochs of --finetune full, which they imply.")] = None,
    recovery: RecoveryOption = None,
    criterion: CriterionOption = None,
    export: Annotated[str, typer.Option(help=EXPORT_HELP)] = "",
    int8: Int8Flag = False,
    deploy: DeployOption = None,
    transfer: TransferFlag = False,
    json_: JsonFlag = False,
) -> dict[str, Any] | None:
    """Prune the model as a point of a front says, repair, train as the point was, verify and save it.

    The folder stands alone: weights, policy, exports and a model card. What the same command has finished is kept.
    """
    from autoprune.application.training import Training

    training = Training.of(finetune, finetune_epochs, recovery)
    if (task is None) == (model is None):
        raise InputError("say what to prune: --task JOB.yaml with data, or --model MODEL without; one of the two")
    source = model if task is None else _load(task, None)
    assert source is not None

    from autoprune.application.order import Order
    from autoprune.application.under_way import UnderWay

    order = Order(weights, training, criterion, _words(export), int8, deploy, transfer)
    call = UnderWay(policy, source, at, out, order)
    follow(call, call, console(json_))
    return call.report if json_ else _shown(print_applied, call.report)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a search.")],
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Rebuild report.html of a run."""
    from autoprune.report import build_report

    path = build_report(run_dir)
    print(path)
    if open_:
        webbrowser.open(path.resolve().as_uri())


def _shown(show: Callable[[Any], None], document: object) -> dict[str, Any] | None:
    show(document)
    return None


def _load(path: Path, overrides: Sequence[str] | None) -> Job:
    from autoprune.files.job import Job

    return Job.load(path, overrides or ())


def _explain(error: Exception) -> tuple[str, int]:
    """A message and exit code for an exception that is not ours."""
    if hasattr(error, "format_message"):  # the parser's usage errors, whichever click typer comes with
        return str(error.format_message()), 2
    if type(error).__name__ == "Abort":
        return INTERRUPTED, 130
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename}" if error.filename else ""
        return f"the system refuses a file{where}: {error.strerror}; what was computed is kept", 3
    text = " ".join(str(error).split()) or "no message"
    return f"unexpected {type(error).__name__}: {text} (AUTOPRUNE_DEBUG=1 shows where)", 3


def _exit_code(code: object) -> int:
    if isinstance(code, dict):
        print(json.dumps(code, indent=1, default=str))
    return code if isinstance(code, int) else 0


def _say(message: str, code: int) -> int:
    print(f"autoprune: {' '.join(message.split())}", file=sys.stderr)
    return code


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _seconds(text: str) -> float:
    """90, 90s, 10m or 2h in seconds."""
    unit = text[-1:] if text[-1:] in UNITS_S else "s"
    number = text.removesuffix(unit)
    try:
        return float(number) * UNITS_S[unit]
    except ValueError:
        raise InputError(f"--time-limit takes a time such as 90s, 10m or 2h, not {text!r}") from None


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--budgets takes ratios with commas, as in 0.7,0.5,0.3, not {text!r}") from None
