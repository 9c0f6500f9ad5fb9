"""What executors with workers share: asks that wait or run, and how often a lost or failed one is tried again."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autoprune.evaluation import Ask, Evaluation


@dataclass
class Task:
    """An ask under its index; `losses` counts the workers that died, hung or raised over it."""

    index: int
    ask: Ask
    losses: int = 0


class Tasks:
    """Asks that wait for a worker and results that wait to be fetched; `retries` bounds the tries after the first."""

    def __init__(self, retries: int) -> None:
        self.waiting: deque[Task] = deque()
        self.done: deque[tuple[int, Evaluation]] = deque()
        self.retried = 0
        self._retries = retries

    def submit(self, index: int, ask: Ask) -> None:
        """Queue `ask`."""
        self.waiting.append(Task(index, ask))

    def finish(self, task: Task, evaluation: Evaluation) -> None:
        """Keep a result to be fetched."""
        self.done.append((task.index, replace(evaluation, ask=task.ask)))

    def answered(self, task: Task, kind: str, evaluation: Evaluation) -> None:
        """Take what `_worker.answer` gave: a result, or a failure that is worth another try ("raised")."""
        if kind == "raised":
            self.again(task, evaluation, times=False)
        else:
            self.finish(task, evaluation)

    def again(self, task: Task, failure: Evaluation, times: bool = True) -> None:
        """Put a lost or failed ask first in the queue, or after the last try keep `failure` as its answer.

        With `times` the error says how many workers were lost over it.
        """
        task.losses += 1
        if task.losses <= self._retries:
            self.retried += 1
            self.waiting.appendleft(task)
        elif times and task.losses > 1:
            self.finish(task, replace(failure, error=f"{failure.error}, {task.losses} times"))
        else:
            self.finish(task, failure)

    def unsend(self, tasks: Sequence[Task]) -> None:
        """Put asks that no worker has begun first in the queue again."""
        self.waiting.extendleft(reversed(tasks))

    def forget(self, index: int) -> None:
        """Drop an ask that waits, or its result."""
        self.waiting = deque(t for t in self.waiting if t.index != index)
        self.done = deque(d for d in self.done if d[0] != index)

    def clear(self) -> None:
        """Drop everything."""
        self.waiting.clear()
        self.done.clear()
