"""Evaluates in this very process, one ask at a time: for debugging, tests and machines where nothing may be started."""

from __future__ import annotations

import time
from collections import deque

from autoprune.errors import one_line
from autoprune.evaluation import Ask, Evaluation
from autoprune.protocols import EvaluatorFactory


class Inline:
    """Runs the oldest ask inside `next_done`, however long it takes; a timeout of 0 runs nothing."""

    slots = 1

    def __init__(self, make_evaluator: EvaluatorFactory) -> None:
        self._evaluate = make_evaluator()
        self._waiting: deque[tuple[int, Ask]] = deque()

    def submit(self, index: int, ask: Ask) -> None:
        """Queue `ask`."""
        self._waiting.append((index, ask))

    def next_done(self, timeout: float | None = None) -> tuple[int, Evaluation] | None:
        """Evaluate the oldest ask; None where nothing waits."""
        if not self._waiting or timeout == 0:
            return None
        index, ask = self._waiting.popleft()
        start = time.perf_counter()
        try:
            return index, self._evaluate(ask)
        except Exception as error:  # the user's code may fail in any way, and that is a value
            return index, Evaluation.failed(ask, one_line(error), seconds=time.perf_counter() - start)

    def cancel(self, index: int) -> None:
        """Forget the ask; its result never comes."""
        self._waiting = deque(item for item in self._waiting if item[0] != index)

    def close(self) -> None:
        """Forget all asks."""
        self._waiting.clear()
