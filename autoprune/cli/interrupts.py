"""Ctrl-C that is not lost: code beneath us, C extensions too, may swallow the KeyboardInterrupt that it raises."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


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
