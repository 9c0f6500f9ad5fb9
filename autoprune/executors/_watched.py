"""An executor whose mistakes name it: what it raises, what it answers that is no answer."""

from __future__ import annotations

from collections.abc import Sequence

from autoprune import plugins
from autoprune.evaluation import Ask, Evaluation
from autoprune.protocols import Executor, WorkerState

MEMBERS = ("submit", "next_done", "cancel", "close", "workers", "retried")
"""What the class of an executor has; `slots` may come with the instance."""


class Watched:
    """Stands for the executor that the job calls `name`."""

    def __init__(self, name: str, executor: Executor) -> None:
        plugins.check_has("executors", name, executor, "slots", *MEMBERS)
        self._name, self._executor = name, executor
        self.slots = executor.slots

    def submit(self, index: int, ask: Ask) -> None:
        """Hand `ask` on."""
        with plugins.calling("executors", self._name, "in submit()"):
            self._executor.submit(index, ask)

    def next_done(self, timeout: float | None = None) -> tuple[int, Evaluation] | None:
        """The next result."""
        with plugins.calling("executors", self._name, "in next_done()"):
            found = self._executor.next_done(timeout)
            if found is not None and not isinstance(found[1], Evaluation):
                raise TypeError(f"it answers with a {type(found[1]).__name__}, not an Evaluation")
        return found

    def cancel(self, index: int) -> None:
        """Forget the ask."""
        with plugins.calling("executors", self._name, "in cancel()"):
            self._executor.cancel(index)

    def close(self) -> None:
        """Stop it."""
        with plugins.calling("executors", self._name, "in close()"):
            self._executor.close()

    def workers(self) -> Sequence[WorkerState]:
        """How its workers are doing."""
        with plugins.calling("executors", self._name, "in workers()"):
            return self._executor.workers()

    @property
    def retried(self) -> int:
        """Asks that had to be tried again so far."""
        return self._executor.retried
