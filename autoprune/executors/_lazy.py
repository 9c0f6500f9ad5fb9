"""An executor that starts another one at the first ask: where the record answers everything, no worker is started."""

from __future__ import annotations

from collections.abc import Callable

from autoprune.evaluation import Ask, Evaluation
from autoprune.protocols import Executor, WorkerState


class Lazy:
    """Stands for the executor that `make` starts."""

    slots = 1

    def __init__(self, make: Callable[[], Executor]) -> None:
        self._make = make
        self._started: Executor | None = None

    def submit(self, index: int, ask: Ask) -> None:
        """Hand `ask` on."""
        if self._started is None:
            self._started = self._make()
        self._started.submit(index, ask)

    def next_done(self, timeout: float | None = None) -> tuple[int, Evaluation] | None:
        """The next result; None before the first ask."""
        return None if self._started is None else self._started.next_done(timeout)

    def cancel(self, index: int) -> None:
        """Forget the ask."""
        if self._started is not None:
            self._started.cancel(index)

    def close(self) -> None:
        """Stop what was started."""
        if self._started is not None:
            self._started.close()

    def workers(self) -> tuple[WorkerState, ...]:
        """Those of what was started."""
        return () if self._started is None else tuple(self._started.workers())

    @property
    def retried(self) -> int:
        """Asks that had to be tried again so far."""
        return 0 if self._started is None else self._started.retried
