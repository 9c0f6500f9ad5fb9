"""How fast a run is: steps of its preparation, workers that are busy at a time."""

from __future__ import annotations

import time
from collections.abc import Callable

from autoprune.protocols import Executor, Step

SETTLED_S = 10.0
"""From the first answer on, before it counts how many workers were busy, and not how many there are."""


class Pace:
    """Measures both; `now` is a clock."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._step, self._began, self._from = Step("prepare"), now(), 0.0
        self._slots, self._busy = 1, 1.0
        self._first: tuple[float, float] | None = None  # when the first answer came, and the work done by then

    def take(self, step: Step) -> None:
        """A step of the preparation."""
        if step.stage != self._step.stage:
            self._began, self._from = self._now(), step.done  # a stage that is gone on with begins part done
        self._step = step

    @property
    def counted(self) -> str:
        """How far the stage is, in words; nothing where it is one step."""
        step = self._step
        if step.unit:
            return f"{step.done:.0f} of {step.total:.0f} {step.unit}"
        return f"{step.done / step.total:.0%}" if step.done else ""

    @property
    def left_s(self) -> float | None:
        """What this stage and all that come after it take; None where that is not known."""
        step = self._step
        if step.ahead_s is None:
            return None
        took, done = self._now() - self._began, step.done - self._from
        return step.ahead_s + (took * (step.total - step.done) / done if done > 0 else 0.0)

    def begin(self, slots: int) -> None:
        """Evaluations begin, on so many workers."""
        self._slots, self._busy, self._first = slots, float(slots), None

    def told(self, executor: Executor) -> None:
        """An answer came."""
        done_s, now = sum(w.busy_s for w in executor.workers()), self._now()
        if self._first is None:
            self._first = now, done_s
        wall, worked = now - self._first[0], done_s - self._first[1]
        if wall > SETTLED_S and worked > 0:
            self._busy = min(float(self._slots), max(0.25, worked / wall))

    @property
    def parallel(self) -> float:
        """Workers that are at work at a time."""
        return self._busy
