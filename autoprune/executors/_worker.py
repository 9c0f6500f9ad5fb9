"""The inside of a worker process of executors/local.py: builds its evaluator once, then answers asks until EOF."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Literal

from autoprune.errors import AutopruneError, InputError, one_line
from autoprune.evaluation import Ask, Evaluation
from autoprune.protocols import Evaluator, EvaluatorFactory

BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from autoprune.executors._worker import main; main(sys.argv[2])"
)
SHARED = "shared"
"""The socket comes through stdin, where no descriptor can be passed on."""
"""What the parent passes to `python -c`: never its own main module, so a user's script needs no guard."""


def main(place: str) -> None:
    """Serve the socket at `place`: gets the factory, then asks; sends (awake, ready, broken, done or raised, value)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it tells us by closing the socket
    connection = Connection(_handle(place))
    asks: queue.SimpleQueue[Ask] = queue.SimpleQueue()
    with contextlib.suppress(OSError):  # a closed socket: the parent is gone
        try:
            make: EvaluatorFactory = connection.recv()  # what it needs is imported here
            connection.send(("awake", None))
            evaluate = make()
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


def _handle(place: str) -> int:
    """The socket that the parent passed on: by its descriptor, or (Windows) by what it wrote to stdin."""
    if sys.platform == "win32":
        return socket.fromshare(sys.stdin.buffer.read()).detach()
    return int(place)


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
