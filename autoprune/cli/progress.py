"""The progress view of the command line: live on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
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
    view, started, seen, note = _FrontSoFar(), time.monotonic(), 0, ""
    with Live(Group(bar, view.table()), console=console, refresh_per_second=4, transient=True) as live:
        for evaluation in run:
            view.add(evaluation)
            seen += 1
            rate = seen / max(time.monotonic() - started, 1e-9)
            count = f"{seen} evaluations, {rate:.1f}/s"
            bar.update(task, description=run.stage, total=run.total, completed=run.done, count=count)
            live.update(Group(bar, view.table()))
            note = _say_note(run, note, live.console)
    _say_note(run, note, console)  # what the end had to say


def _follow_plain(run: _Run, console: Console) -> None:
    started = said = time.monotonic()
    stage = note = ""
    for seen, _ in enumerate(run, start=1):
        now = time.monotonic()
        note = _say_note(run, note, console)
        if run.stage != stage or now - said > PLAIN_EVERY_S:
            share = run.done / max(run.total, 1e-9)
            left = (now - started) * (1 - share) / max(share, 1e-9)
            rate = seen / max(now - started, 1e-9)
            console.print(
                f"{run.stage}: {seen} evaluations, {rate:.1f}/s, {share:.0%}, about {left:.0f} s left", highlight=False
            )
            stage, said = run.stage, now
    _say_note(run, note, console)


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
