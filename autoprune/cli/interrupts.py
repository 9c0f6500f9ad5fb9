"""Ctrl-C that is not lost: code beneath us, C extensions too, may swallow the KeyboardInterrupt that it raises."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

from autoprune.errors import AutopruneError

T = TypeVar("T")
INTERRUPTED = "interrupted; the same command goes on where it stopped"
TOO_EARLY = "interrupted while the run was prepared, before its first evaluation; the same command starts it"


class TooEarlyError(AutopruneError):
    """Ctrl-C before anything was evaluated: there is nothing to go on from."""


@contextlib.contextmanager
def preparing() -> Iterator[None]:
    """Inside, nothing is evaluated yet, and Ctrl-C says so."""
    try:
        yield
    except KeyboardInterrupt:
        raise TooEarlyError(TOO_EARLY) from None


def heeding(source: Iterable[T]) -> Iterator[T]:
    """The items of `source`; ends with a KeyboardInterrupt after the item over which one was swallowed.

    Where somebody else handles SIGINT, or in another thread than the main one, these are the items alone.
    """
    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield from source
        return
    interrupted = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        for item in source:
            yield item
            if interrupted:
                raise KeyboardInterrupt
        if interrupted:
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, previous)
