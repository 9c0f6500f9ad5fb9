"""What executors with workers share: asks that wait or run, and how often a lost or failed one is tried again."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autoprune.evaluation import Ask, Evaluation

ADVICE = "lower evaluator.calibration, evaluator.memory or executor.workers"


def fewer(slots: int, said: str) -> tuple[int, str]:
    """How many workers go on after one was ended for lack of memory, which is said; and why its ask is lost."""
    left = max(1, slots - 1)
    go = "1 worker goes" if left == 1 else f"{left} workers go"
    warnings.warn(f"{said}: {go} on; {ADVICE}", stacklevel=3)
    return left, f"the worker was ended for lack of memory; {ADVICE}"


@dataclass
class Asked:
    """An ask under its index; `losses` counts the workers that died, hung or raised over it."""

    index: int
    ask: Ask
    losses: int = 0


class Asks:
    """Asks that wait for a worker and results that wait to be fetched; `retries` bounds the tries after the first."""

    def __init__(self, retries: int) -> None:
        self.waiting: deque[Asked] = deque()
        self.done: deque[tuple[int, Evaluation]] = deque()
        self.retried = 0
        self._retries = retries

    def submit(self, index: int, ask: Ask) -> None:
        """Queue `ask`."""
        self.waiting.append(Asked(index, ask))

    def finish(self, asked: Asked, evaluation: Evaluation) -> None:
        """Keep a result to be fetched."""
        self.done.append((asked.index, replace(evaluation, ask=asked.ask)))

    def answered(self, asked: Asked, kind: str, evaluation: Evaluation) -> None:
        """Take what `_worker.answer` gave: a result, or a failure that is worth another try ("raised")."""
        if kind == "raised":
            self.again(asked, evaluation, times=False)
        else:
            self.finish(asked, evaluation)

    def again(self, asked: Asked, failure: Evaluation, times: bool = True) -> None:
        """Put a lost or failed ask first in the queue, or after the last try keep `failure` as its answer.

        With `times` the error says how many workers were lost over it.
        """
        asked.losses += 1
        if asked.losses <= self._retries:
            self.retried += 1
            self.waiting.appendleft(asked)
        elif times and asked.losses > 1:
            self.finish(asked, replace(failure, error=f"{failure.error}, {asked.losses} times"))
        else:
            self.finish(asked, failure)

    def unsend(self, asks: Sequence[Asked]) -> None:
        """Put asks that no worker has begun first in the queue again."""
        self.waiting.extendleft(reversed(asks))

    def forget(self, index: int) -> None:
        """Drop an ask that waits, or its result."""
        self.waiting = deque(t for t in self.waiting if t.index != index)
        self.done = deque(d for d in self.done if d[0] != index)

    def clear(self) -> None:
        """Drop everything."""
        self.waiting.clear()
        self.done.clear()
