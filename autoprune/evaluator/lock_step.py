"""Batches that go forward in lock step, one at a time: each waits where something must be known of all of them.

A refit needs the inputs of a layer over all samples before any of them goes on. Each batch has a thread of its own,
which runs to the next meeting; so what is alive is one batch's forward, and of the others what they hold as they wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
P = TypeVar("P")


class OutOfStepError(Exception):
    """Batches do not meet at the same places: the model does not run alike on all samples."""


class Meet(Protocol):
    """What a forward calls where something must be known of all batches.

    `key` names the place, `piece` is what this batch brings; `resolve` is called once, with the pieces of all batches
    in their order, and all get what it returns.
    """

    def __call__(self, key: str, piece: P, resolve: Callable[[Sequence[P]], R], /) -> R: ...


def alone(key: str, piece: P, resolve: Callable[[Sequence[P]], R], /) -> R:
    """The meeting of one batch."""
    return resolve([piece])


class _StopError(BaseException):
    """Ends a forward that waits; no Exception, which a user's model might catch."""


def in_step(forwards: Sequence[Callable[[Meet], T]]) -> list[T]:
    """What `forwards` return, each called with how it meets the others; a single one runs as it is.

    One runs at a time and always in the same order, so that results do not depend on the threads.

    Raises:
        OutOfStepError: they do not meet at the same places.
    """
    if len(forwards) == 1:
        return [forwards[0](alone)]
    return _LockStep(forwards).run()


class _LockStep:
    def __init__(self, forwards: Sequence[Callable[[Meet], Any]]) -> None:
        self._forwards, self._threads_each = forwards, torch.get_num_threads()
        self._turns = [threading.Semaphore(0) for _ in forwards]
        self._back = threading.Semaphore(0)
        self._at: dict[int, tuple[str, Any, Callable[[Sequence[Any]], Any]]] = {}
        self._results: dict[int, Any] = {}
        self._found: Any = None
        self._error: BaseException | None = None
        self._stopped = False

    def run(self) -> list[Any]:
        """Round after round, each batch to its next meeting."""
        numbers = range(len(self._forwards))
        threads = [threading.Thread(target=self._go, args=(i,), daemon=True) for i in numbers]
        for thread in threads:
            thread.start()
        try:
            while len(self._results) < len(threads):
                for i in numbers:
                    self._turns[i].release()
                    self._back.acquire()
                    if self._error is not None:
                        raise self._error
                self._resolve()
            return [self._results[i] for i in numbers]
        finally:
            self._stopped, self._error = True, None
            for turn in self._turns:
                turn.release()
            for thread in threads:
                thread.join()

    def _resolve(self) -> None:
        """What was asked for at this meeting, or the end of all."""
        waiting, self._at = self._at, {}
        keys = {key for key, _, _ in waiting.values()}
        if len(keys) > 1 or (waiting and self._results):
            raise OutOfStepError(f"batches meet at {', '.join(sorted(keys))}, {len(self._results)} at their end")
        if waiting:
            self._found = waiting[0][2]([waiting[i][1] for i in range(len(waiting))])

    def _go(self, i: int) -> None:
        torch.set_num_threads(self._threads_each)  # some libraries keep their number by thread
        self._turns[i].acquire()
        with suppress(_StopError):
            try:
                if not self._stopped:
                    self._results[i] = self._forwards[i](self._meeting(i))
            except _StopError:
                raise
            except BaseException as error:  # is raised where all of this was asked for
                self._error = error
        self._back.release()

    def _meeting(self, i: int) -> Meet:
        def meet(key: str, piece: P, resolve: Callable[[Sequence[P]], R], /) -> R:
            self._at[i] = key, piece, resolve
            del piece  # it may be large, and is let go of when all are there
            self._back.release()
            self._turns[i].acquire()
            if self._stopped:
                raise _StopError
            found: R = self._found
            return found

        return meet
