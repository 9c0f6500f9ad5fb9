"""The progress view of the command line: live on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from autoprune.evaluation import Evaluation
    from autoprune.protocols import WorkerState

PLAIN_EVERY_S = 15.0
N_FRONT_ROWS = N_WORKER_ROWS = 8


class _Run(Protocol):
    """What the view needs of a Run."""

    @property
    def stage(self) -> str: ...
    @property
    def note(self) -> str: ...
    @property
    def total(self) -> float: ...
    @property
    def done(self) -> float: ...
    def __iter__(self) -> Iterator[Evaluation]: ...


def follow(run: _Run, console: Console) -> None:
    """Drive `run` to its end and show how it goes: live on a terminal, a line now and then elsewhere."""
    if console.is_terminal:
        _follow_live(run, console)
    else:
        _follow_plain(run, console)


def _follow_live(run: _Run, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
    bar = Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(elapsed_when_finished=True))
    task = bar.add_task("starting", total=None, count="")
    view, pace, note = _FrontSoFar(), _Pace(), ""
    with Live(Group(bar, view.table()), console=console, refresh_per_second=4, transient=True) as live:
        for evaluation in run:
            view.add(evaluation)
            count = pace.tick(run)
            bar.update(task, description=run.stage, total=run.total, completed=run.done, count=count)
            live.update(Group(bar, _workers_table(run), view.table()))
            note = _say_note(run, note, live.console)
    _say_note(run, note, console)  # what the end had to say


def _follow_plain(run: _Run, console: Console) -> None:
    said, stage, note, pace = time.monotonic(), "", "", _Pace()
    for _ in run:
        count, now = pace.tick(run), time.monotonic()
        note = _say_note(run, note, console)
        if run.stage != stage or now - said > PLAIN_EVERY_S:
            share = run.done / max(run.total, 1e-9)
            words = f"{count}, {share:.0%}{pace.left(run)}{_workers_line(run)}"
            console.print(f"{run.stage}: {words}", highlight=False)
            stage, said = run.stage, now
    _say_note(run, note, console)


class _Pace:
    """How fast a run is from its first evaluation on: what workers take to start is no rate."""

    def __init__(self) -> None:
        self._seen, self._began, self._done = 0, 0.0, 0.0

    def tick(self, run: _Run) -> str:
        """Count an evaluation; how many there are and, from the second on, how many a second."""
        if self._seen == 0:
            self._began, self._done = time.monotonic(), run.done
        self._seen += 1
        if self._seen == 1:
            return "1 evaluation"
        took = max(time.monotonic() - self._began, 1e-9)
        return f"{self._seen} evaluations, {(self._seen - 1) / took:.1f}/s"

    def left(self, run: _Run) -> str:
        """The time left, as soon as that can be told."""
        took, done = time.monotonic() - self._began, run.done - self._done
        return f", about {took * max(run.total - run.done, 0.0) / done:.0f} s left" if done > 0 else ""


def _workers(run: _Run) -> Sequence[WorkerState]:
    """The workers of a run that shows them."""
    workers: Sequence[WorkerState] = getattr(run, "workers", ())
    return workers


def _workers_line(run: _Run) -> str:
    """How many workers are at it and how often asks had to be tried again."""
    workers = _workers(run)
    if not workers:
        return ""
    at_it, again = sum(w.state != "starting" for w in workers), getattr(run, "retried", 0)
    retried = f", {again} tried again" if again else ""
    return f"; {at_it} of {len(workers)} workers{retried}"


def _workers_table(run: _Run) -> Table:
    """The workers under the names by which Ray's dashboard shows them, the busiest first."""
    table = Table(title=f"workers{_workers_line(run).removeprefix(';')}", title_justify="left")
    workers = sorted(_workers(run), key=lambda w: -w.done)[:N_WORKER_ROWS]
    for heading in ("worker", "node", "state", "answers", "answers/s"):
        table.add_column(heading, justify="right" if heading.startswith("answers") else "left")
    for w in workers:
        rate = f"{w.done / w.busy_s:.2f}" if w.busy_s else "-"
        table.add_row(w.name, w.node or "here", w.state, str(w.done), rate)
    return table


def _say_note(run: _Run, said: str, console: Console) -> str:
    """Print what the run has to say, once."""
    if run.note and run.note != said:
        console.print(run.note, markup=False, highlight=False, soft_wrap=True)
    return run.note


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
        from autoprune.pareto import pareto_front

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
