"""The progress view of the command line: live on a terminal, a line now and then elsewhere.

A second look-out beside the loop shows a stage also while it is one long step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from autoprune.cli.interrupts import heeding

if TYPE_CHECKING:
    from autoprune.evaluation import Evaluation
    from autoprune.protocols import WorkerState

PLAIN_EVERY_S = 15.0
LONG_S = 2.0
"""A stage that takes longer is said, also where nothing comes of it meanwhile."""
LOOK_S = 0.5
N_FRONT_ROWS = N_WORKER_ROWS = 8


class _Run(Protocol):
    """What the view needs of a Run. It may also have `counted`, `left_s`, `workers`, and `of`: what `total` is of."""

    @property
    def stage(self) -> str: ...
    @property
    def note(self) -> str: ...
    @property
    def total(self) -> float: ...
    @property
    def done(self) -> float: ...


def follow(run: _Run, source: Iterable[Any], console: Console) -> None:
    """Drive `source`, steps or evaluations of `run`, to its end and show how it goes.

    Raises:
        KeyboardInterrupt: Ctrl-C; where it was swallowed beneath, after the step that was under way.
    """
    source = heeding(source)
    if console.is_terminal:
        _follow_live(run, source, console)
    else:
        _follow_plain(run, source, console)


def _follow_live(run: _Run, source: Iterable[Any], console: Console) -> None:
    view, note = _View(run), ""
    with Live(view, console=console, refresh_per_second=4, transient=True) as live:
        for item in source:
            if hasattr(item, "ask"):
                view.pace.tick(run)
                view.front.add(item)
            note = _say_note(run, note, live.console)
    _say_note(run, note, console)  # what the end had to say


def _follow_plain(run: _Run, source: Iterable[Any], console: Console) -> None:
    note, pace = "", _Pace()
    teller, lock = Teller(time.monotonic()), threading.Lock()

    def tell(at_once: bool) -> None:
        with lock:
            if teller.due(run.stage, time.monotonic(), at_once):
                console.print(f"{run.stage}: {_words(run, pace)}", markup=False, highlight=False, soft_wrap=True)

    with _looking_out(lambda: tell(at_once=False)):
        for item in source:
            if hasattr(item, "ask"):
                pace.tick(run)
            note = _say_note(run, note, console)
            tell(at_once=hasattr(item, "ask"))
    _say_note(run, note, console)


@contextmanager
def _looking_out(look: Any) -> Iterator[None]:
    """`look` is called twice a second inside."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(LOOK_S):
            look()

    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


class Teller:
    """When a line is due: at the first answer of a stage, after two seconds of one, then every 15 seconds."""

    def __init__(self, now: float) -> None:
        self._stage, self._began, self._said = "", now, float("-inf")

    def due(self, stage: str, now: float, at_once: bool) -> bool:
        """Whether to speak at `now`; `at_once`: an answer came."""
        if stage != self._stage:
            self._stage, self._began, self._said = stage, now, float("-inf")
        new = self._said < self._began
        if new and not at_once and now - self._began < LONG_S:
            return False
        if not new and now - self._said < PLAIN_EVERY_S:
            return False
        self._said = now
        return True


class _View:
    """What a terminal shows, made anew whenever it is drawn."""

    def __init__(self, run: _Run) -> None:
        self.run, self.pace, self.front = run, _Pace(), _FrontSoFar()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"))
        self._bar = Progress(*columns)
        self._task = self._bar.add_task("starting", total=None, words="")

    def __rich__(self) -> Group:
        run = self.run
        left = _left_s(run, self.pace)
        words = ", ".join(filter(None, [_counted(run), self.pace.rate, "" if left is None else f"ETA {span(left)}"]))
        total = run.total or None
        self._bar.update(self._task, description=run.stage, total=total, completed=run.done, words=words)
        parts = [_workers_table(run)] if _workers(run) else []
        return Group(self._bar, *parts, *([self.front.table()] if self.pace.seen else []))


class _Pace:
    """How fast a run is from its first evaluation on: what workers take to start is no rate."""

    def __init__(self) -> None:
        self.seen, self._began, self._done = 0, time.monotonic(), 0.0

    def tick(self, run: _Run) -> None:
        """Count an evaluation."""
        if self.seen == 0:
            self._began, self._done = time.monotonic(), run.done
        self.seen += 1

    @property
    def rate(self) -> str:
        """Evaluations a second, from the second on."""
        took = max(time.monotonic() - self._began, 1e-9)
        return f"{(self.seen - 1) / took:.1f}/s" if self.seen > 1 else ""

    def left_s(self, run: _Run) -> float | None:
        """The time left where the run itself does not know, as soon as that can be told."""
        took, done = time.monotonic() - self._began, run.done - self._done
        return took * max(run.total - run.done, 0.0) / done if done > 0 else None


def span(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _words(run: _Run, pace: _Pace) -> str:
    """How far the stage and the whole run are."""
    left = _left_s(run, pace)
    share = f"{run.done / run.total:.0%} of the {getattr(run, 'of', 'run')}" if run.total else ""
    parts = [_counted(run), pace.rate if run.total else "", share, "" if left is None else f"about {span(left)} left"]
    return (", ".join(filter(None, parts)) or "under way") + _workers_line(run)


def _counted(run: _Run) -> str:
    return str(getattr(run, "counted", f"{run.done:.0f} of {run.total:.0f} evaluations"))


def _left_s(run: _Run, pace: _Pace) -> float | None:
    left: float | None = getattr(run, "left_s", None)
    return pace.left_s(run) if left is None else left


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
