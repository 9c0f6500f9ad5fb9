"""The progress view of the command line: live on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from autoprune.evaluation import Evaluation

PLAIN_EVERY_S = 15.0
N_FRONT_ROWS = 8


class _Run(Protocol):
    """What the view needs of a Run."""

    @property
    def stage(self) -> str: ...
    @property
    def total(self) -> int: ...
    @property
    def done(self) -> int: ...
    def __iter__(self) -> Iterator[Evaluation]: ...


def follow(run: _Run, console: Console) -> None:
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
