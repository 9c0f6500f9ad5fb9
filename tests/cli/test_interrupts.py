"""Ctrl-C ends a command also where something beneath it swallowed the exception."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import pytest

from autoprune.cli.interrupts import heeding


@pytest.fixture(autouse=True)
def pythons_own_handler() -> Iterator[None]:
    """What Python has at its start, but where it was started in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def steps(swallow_at: int, n: int) -> Iterator[int]:
    for i in range(n):
        if i == swallow_at:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        yield i


@pytest.mark.parametrize("swallow_at", [0, 2, 4])
def test_a_swallowed_interrupt_ends_it_after_the_item(swallow_at: int) -> None:
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(heeding(steps(swallow_at, 5)))
    assert seen == list(range(swallow_at + 1))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_at_the_very_end_counts() -> None:
    def at_the_end() -> Iterator[int]:
        yield 1
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        list(heeding(at_the_end()))


def test_an_interrupt_is_raised_where_it_comes() -> None:
    closed = []

    def work() -> Iterator[int]:
        try:
            yield 1
            signal.raise_signal(signal.SIGINT)
            yield 2
        finally:
            closed.append(True)

    with pytest.raises(KeyboardInterrupt):
        list(heeding(work()))
    assert closed


def test_without_one_all_items_come_and_the_handler_is_put_back() -> None:
    assert list(heeding(range(4))) == [0, 1, 2, 3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_handler_and_other_threads_are_let_be() -> None:
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        assert list(heeding(steps(1, 3))) == [0, 1, 2]
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [1]
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.extend(heeding(range(3))))
    thread.start()
    thread.join()
    assert got == [0, 1, 2]
