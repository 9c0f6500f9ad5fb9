"""The inside of a worker process of executors/local.py: builds its evaluator once, then answers asks until EOF."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Literal

from autoprune.errors import AutopruneError, InputError, one_line
from autoprune.evaluation import Ask, Evaluation
from autoprune.protocols import Evaluator

BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from autoprune.executors._worker import main; main(int(sys.argv[2]))"
)
"""What the parent passes to `python -c`: never its own main module, so a user's script needs no guard."""


def main(descriptor: int) -> None:
    """Serve the socket `descriptor`: gets the factory, then asks; sends (ready, broken, done or raised, value)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it tells us by closing the socket
    connection = Connection(descriptor)
    asks: queue.SimpleQueue[Ask] = queue.SimpleQueue()
    with contextlib.suppress(OSError):  # a closed socket: the parent is gone
        try:
            evaluate: Evaluator = connection.recv()()
        except EOFError:
            return
        except Exception as error:  # the user's code may fail in any way
            connection.send(("broken", broken(error)))
            return
        one_thread()
        threading.Thread(target=_receive, args=(connection, asks), daemon=True).start()
        connection.send(("ready", None))
        while True:
            connection.send(answer(evaluate, asks.get()))


def answer(evaluate: Evaluator, ask: Ask) -> tuple[Literal["done", "raised"], Evaluation]:
    """The evaluation, or a failed one where the evaluator raised: that may pass, so it is worth another try."""
    start = time.perf_counter()
    try:
        return "done", evaluate(ask)
    except Exception as error:  # the user's code may fail in any way, and that is a value
        return "raised", Evaluation.failed(ask, one_line(error), seconds=time.perf_counter() - start)


def broken(error: Exception) -> tuple[bool, str]:
    """Why an evaluator could not be built: whether it is the user's input, and one line."""
    if isinstance(error, AutopruneError):
        return isinstance(error, InputError), str(error)
    return False, f"the evaluator could not be built: {one_line(error)}"


def _receive(connection: Connection, asks: queue.SimpleQueue[Ask]) -> None:
    """Feed `asks`. A closed socket means that the parent is gone, even by kill -9: leave at once, mid-evaluation."""
    while True:
        try:
            asks.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)


def one_thread() -> None:
    """A worker a core beats many threads; the environment does not reach a torch that was already imported."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
