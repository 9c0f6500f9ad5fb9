"""Torch on one thread for a while: sums over threads differ in the last bits, and a search must not depend on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def on_threads(wanted: int) -> Iterator[None]:
    """Torch computes on so many threads inside; the caller's number comes back. It wraps a function, too."""
    threads = torch.get_num_threads()
    if threads == wanted:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes on one thread inside. `@one_thread()` wraps a function."""
    with on_threads(1):
        yield
