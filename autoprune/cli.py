"""The command line: inspect, search, compare, apply, report. The only place that prints or exits."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import webbrowser
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from autoprune.errors import AutopruneError, InputError

if TYPE_CHECKING:
    from autoprune.evaluation import Evaluation
    from autoprune.job import Job
    from autoprune.protocols import Task
    from autoprune.structure import Structure

app = typer.Typer(
    help="Search how much each layer of a neural network should be pruned.",
    add_completion=False,
    rich_markup_mode=None,
)
PLAIN_EVERY_S = 15.0
PLAIN_WIDTH = 140
INTERRUPTED = "interrupted; the same command goes on where it stopped"
N_FRONT_ROWS = 8
JobPath = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")]
OutPath = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The folder to write to.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, progress on stderr.")]


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
    except AutopruneError as error:
        return _say(str(error), 2 if isinstance(error, InputError) else 3)
    except Exception as error:
        if os.environ.get("AUTOPRUNE_DEBUG"):
            raise
        return _say(*_explain(error))
    if code == 130:  # or into this, by version
        return _say(INTERRUPTED, 130)
    return _exit_code(code)


@app.command()
def inspect(job: JobPath, json_: JsonFlag = False, set_: SetOption = None) -> dict[str, Any] | None:
    """Show groups, widths, their share of the MACs, and what is frozen and why."""
    from autoprune.space import restrict
    from autoprune.tracing.analyze import analyze

    the_job = _load(job, set_)
    task = the_job.build_task()
    whole = analyze(task.build(), task.example_inputs(), seed=the_job.search.seed)
    facts = _inspect_facts(restrict(whole, the_job.search_space()), task)
    return facts if json_ else _shown(_print_inspect, facts)


@app.command()
def search(
    job: JobPath,
    out: OutPath = None,
    trials: Annotated[int | None, typer.Option(help="Evaluations to spend.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes.")] = None,
    seed: Annotated[int | None, typer.Option(help="The seed of every random choice.")] = None,
    set_: SetOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew instead of resuming.")] = False,
    json_: JsonFlag = False,
) -> dict[str, Any] | None:
    """Search for the front of loss versus cost; a second call with the same --out resumes."""
    flags = {"search.trials": trials, "executor.workers": workers, "search.seed": seed}
    overrides = [*(set_ or []), *(f"{key}={value}" for key, value in flags.items() if value is not None)]
    the_job = _load(job, overrides)

    from autoprune.search_ import search as search_verb

    done = search_verb(the_job, out=out, fresh=fresh)
    _follow(done, _console(json_))
    rows = [dict(row) for row in done.summary]
    if json_:
        return {"out": str(done.path), "points": len(done.front), "summary": rows}
    _print_summary(rows)
    names = ("policy.json", "front.csv", "report.html", "study.journal")
    files = [name for name in names if (Path(done.path) / name).exists()]
    _console(False).print(f"{len(done.front)} points on the front; {done.path}: {', '.join(files)}", soft_wrap=True)
    return None


@app.command()
def compare(
    job: JobPath,
    strategies: Annotated[str, typer.Option(help="Strategies and samplers, with commas.")] = "uniform,global,evolution",
    budgets: Annotated[str | None, typer.Option(help="Ratios to dense, with commas; the job's by default.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each strategy.")] = 3,
    out: OutPath = None,
    set_: SetOption = None,
    json_: JsonFlag = False,
) -> dict[str, Any] | None:
    """Run strategies and samplers at the same budgets and seeds, side by side."""
    the_job = _load(job, set_)
    asked = the_job.budget.plain().at if budgets is None else tuple(_ratio(b) for b in _words(budgets))

    from autoprune.compare_ import compare as compare_verb

    result = compare_verb(the_job, _words(strategies), asked, seeds, out)
    return result if json_ else _shown(_print_rows, list(result["rows"]))


@app.command()
def apply(
    policy: Annotated[Path, typer.Argument(metavar="POLICY.json", help="A front that search wrote.")],
    task: Annotated[Path, typer.Option("--task", metavar="JOB.yaml", help="The job whose task gives model and data.")],
    at: Annotated[str, typer.Option(help="macs=0.5, params=0.5, drop=0.01, knee or a point's id.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write to.")],
    weights: Annotated[Path | None, typer.Option(metavar="FILE.safetensors", help="Other weights.")] = None,
    finetune_epochs: Annotated[float, typer.Option(min=0, help="Epochs of fine-tuning.")] = 0,
    export: Annotated[str, typer.Option(help="Also write onnx, pt2 (with commas).")] = "",
    json_: JsonFlag = False,
) -> dict[str, Any] | None:
    """Prune the model as a point of a front says, repair, verify and save it."""
    from autoprune.export import check_formats

    formats = check_formats(_words(export))
    the_job = _load(task, None)

    from autoprune.apply_ import apply_file

    report_ = apply_file(policy, the_job, weights, at, finetune_epochs, formats, out)
    return report_ if json_ else _shown(_print_mapping, report_)


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
    from autoprune.job import Job

    return Job.load(path, overrides or ())


def _explain(error: Exception) -> tuple[str, int]:
    """A message and exit code for an exception that is not ours."""
    if hasattr(error, "format_message"):  # the parser's usage errors, whichever click typer comes with
        return str(error.format_message()), 2
    if type(error).__name__ == "Abort":
        return INTERRUPTED, 130
    text = " ".join(str(error).split()) or "no message"
    return f"unexpected {type(error).__name__}: {text} (AUTOPRUNE_DEBUG=1 shows where)", 3


def _exit_code(code: object) -> int:
    if isinstance(code, dict):
        print(json.dumps(code, indent=1, default=str))
    return code if isinstance(code, int) else 0


def _say(message: str, code: int) -> int:
    print(f"autoprune: {' '.join(message.split())}", file=sys.stderr)
    return code


def _console(json_: bool) -> Console:
    console = Console(stderr=json_)
    return console if console.is_terminal else Console(stderr=json_, width=PLAIN_WIDTH)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--budgets takes ratios with commas, as in 0.7,0.5,0.3, not {text!r}") from None


def _inspect_facts(structure: Structure, task: Task) -> dict[str, Any]:
    """What `inspect` shows, as plain values; a group's share is that of the operations that it scales."""
    shapes = {t.name: t.shape for op in structure.ops for t in op.tensors}
    macs = {op.name: op.positions * _numel(shapes[op.weight] if op.weight else ()) for op in structure.ops}
    total = max(sum(macs.values()), 1)
    groups = []
    for group in structure:
        own = {s.tensor for s in group.slices}
        share = sum(macs[op.name] for op in structure.ops if op.weight in own) / total
        facts = {"name": group.name, "kind": group.kind, "width": group.width, "grid": list(group.grid)}
        groups.append({**facts, "macs_share": share})
    params = sum(_numel(t.shape) for op in structure.ops for t in op.tensors if t.is_parameter)
    shapes_in = [list(x.shape) for x in task.example_inputs()]
    return {
        "fingerprint": structure.fingerprint,
        "inputs": shapes_in,
        "dense": {"macs": sum(macs.values()), "params": params},
        "groups": groups,
        "frozen": dict(structure.frozen),
    }


def _numel(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _print_inspect(facts: Mapping[str, Any]) -> None:
    console = _console(False)
    table = Table(title=f"{len(facts['groups'])} groups", title_justify="left")
    for heading in ("group", "kind", "width", "allowed widths", "MACs it scales"):
        table.add_column(heading, justify="left" if heading in ("group", "kind") else "right")
    for g in facts["groups"]:
        grid = g["grid"]
        allowed = f"{grid[0]}..{grid[-1]} ({len(grid)})"
        table.add_row(g["name"], g["kind"], str(g["width"]), allowed, f"{g['macs_share']:.1%}")
    console.print(table)
    dense = facts["dense"]
    console.print(f"dense: {dense['macs']:,} MACs a sample, {dense['params']:,} parameters", highlight=False)
    for name, reason in facts["frozen"].items():
        console.print(f"frozen: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)


def _print_summary(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of the asked budgets, search beside uniform and global, and what the run says about them."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.get("metrics") or {} if name != "loss"))
    table = Table(title="best point at each asked budget (validation)", title_justify="left")
    headings = ["budget", "arm", "point", "MACs", "loss", *metrics, *(f"{m} tuned" for m in metrics)]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("arm", "point") else "right")
    for row in rows:
        ours = row["arm"] == "search"
        plain, tuned = row.get("metrics") or {}, row.get("finetuned") or {}
        cells = [_short(row["budget"]), row["arm"], row.get("point") or "", _short(row.get("macs_ratio"))]
        cells += [_short(row.get("loss")), *(_short(plain.get(m)) for m in metrics)]
        cells += [_short(tuned.get(m)) for m in metrics]
        table.add_row(*(str(cell) for cell in cells), style="bold" if ours else "")
    console = _console(False)
    console.print(table)
    for note in dict.fromkeys(row["note"] for row in rows if row.get("note")):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="compare", title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_short(row.get(column)) for column in columns))
    _console(False).print(table)


def _print_mapping(values: Mapping[str, Any], indent: str = "") -> None:
    for name, value in values.items():
        if isinstance(value, Mapping):
            print(f"{indent}{name}:")
            _print_mapping(value, indent + "  ")
        elif isinstance(value, Iterable) and not isinstance(value, str):
            print(f"{indent}{name}: {', '.join(_short(v) for v in value)}")
        else:
            print(f"{indent}{name}: {_short(value)}")


def _short(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class _Run(Protocol):
    """What the view needs of a Run."""

    @property
    def stage(self) -> str: ...
    @property
    def total(self) -> int: ...
    @property
    def done(self) -> int: ...
    def __iter__(self) -> Iterator[Evaluation]: ...


def _follow(run: _Run, console: Console) -> None:
    """Drive `run` to its end and show how it goes: live on a terminal, a line now and then elsewhere."""
    if console.is_terminal:
        _follow_live(run, console)
    else:
        _follow_plain(run, console)


def _follow_live(run: _Run, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TextColumn("{task.fields[rate]}"), TextColumn("ETA"), TimeRemainingColumn())
    task = bar.add_task("starting", total=None, rate="")
    view, started = _FrontSoFar(), time.monotonic()
    with Live(Group(bar, view.table()), console=console, refresh_per_second=4, transient=True) as live:
        for evaluation in run:
            view.add(evaluation)
            _advance(bar, task, run, started)
            live.update(Group(bar, view.table()))


def _advance(bar: Progress, task: TaskID, run: _Run, started: float) -> None:
    rate = run.done / max(time.monotonic() - started, 1e-9)
    bar.update(task, description=run.stage, total=run.total, completed=run.done, rate=f"{rate:.1f}/s")


def _follow_plain(run: _Run, console: Console) -> None:
    started = said = time.monotonic()
    stage = ""
    for _ in run:
        now = time.monotonic()
        if run.stage != stage or now - said > PLAIN_EVERY_S:
            rate = run.done / max(now - started, 1e-9)
            left = (run.total - run.done) / max(rate, 1e-9)
            console.print(
                f"{run.stage}: {run.done}/{run.total} evaluations, {rate:.1f}/s, about {left:.0f} s left",
                highlight=False,
            )
            stage, said = run.stage, now


class _FrontSoFar:
    """The front of the full fitness evaluations seen so far, thinned to a few rows."""

    def __init__(self) -> None:
        self._front: tuple[Evaluation, ...] = ()

    def add(self, evaluation: Evaluation) -> None:
        ask = evaluation.ask
        if not evaluation.ok or ask.split != "fitness" or ask.fraction < 1.0 or not evaluation.costs:
            return
        if self._front and self._front[0].ask.tier != ask.tier:
            return  # losses of different tiers do not compare
        from autoprune.front import pareto_front

        self._front = pareto_front([*self._front, evaluation], [next(iter(evaluation.costs))])

    def table(self) -> Table:
        table = Table(title="front so far", title_justify="left")
        if not self._front:
            return table
        cost = next(iter(self._front[0].costs))
        for heading in (cost, "loss", "policy"):
            table.add_column(heading)
        step = max(1, -(-len(self._front) // N_FRONT_ROWS))
        for evaluation in self._front[::step]:
            table.add_row(f"{evaluation.costs[cost]:.3f}", f"{evaluation.loss:.4g}", evaluation.ask.policy.digest)
        return table


if __name__ == "__main__":
    main()
