"""Evaluates in this very process, one ask at a time: for debugging, tests and machines where nothing may be started."""

from __future__ import annotations

import time

from autoprune.evaluation import Ask, Evaluation
from autoprune.executors._asks import Asks
from autoprune.executors._worker import answer
from autoprune.protocols import EvaluatorFactory, WorkerState


class Inline:
    """Runs the oldest ask inside `next_done`, however long it takes; a timeout of 0 runs nothing.

    An ask over which the evaluator raises is tried `retries` times more, then it is a failed evaluation.
    """

    slots = 1

    def __init__(self, make_evaluator: EvaluatorFactory, retries: int = 2) -> None:
        self._evaluate = make_evaluator()
        self._asks = Asks(retries)
        self._done, self._busy_s = 0, 0.0

    def submit(self, index: int, ask: Ask) -> None:
        """Queue `ask`."""
        self._asks.submit(index, ask)

    def next_done(self, timeout: float | None = None) -> tuple[int, Evaluation] | None:
        """Evaluate the oldest ask; None where nothing waits."""
        while not self._asks.done:
            if not self._asks.waiting or timeout == 0:
                return None
            asked, started = self._asks.waiting.popleft(), time.perf_counter()
            kind, evaluation = answer(self._evaluate, asked.ask)
            self._done, self._busy_s = self._done + 1, self._busy_s + time.perf_counter() - started
            self._asks.answered(asked, kind, evaluation)
        return self._asks.done.popleft()

    def cancel(self, index: int) -> None:
        """Forget the ask; its result never comes."""
        self._asks.forget(index)

    def close(self) -> None:
        """Forget all asks."""
        self._asks.clear()

    def workers(self) -> tuple[WorkerState, ...]:
        """This process."""
        return (WorkerState("here", "busy" if self._asks.waiting else "idle", self._done, self._busy_s),)

    @property
    def retried(self) -> int:
        """Asks that had to be tried again so far."""
        return self._asks.retried
