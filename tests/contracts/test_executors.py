"""The contract of every file in autoprune/executors."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autoprune import plugins
from autoprune.errors import InputError, RunError
from autoprune.evaluation import Ask, Evaluation
from autoprune.policy import Policy
from autoprune.protocols import Evaluator, EvaluatorFactory, Executor
from tests.conftest import RAY
from tests.synthetic import Hills, MakeHills, chain, single_steps

STRUCTURE = chain()
ASKS = [Ask(p, "refit") for p in single_steps(STRUCTURE, Policy.of({g.name: g.grid[0] for g in STRUCTURE.groups}))]
Build = Callable[..., Executor]
EXECUTORS = [pytest.param(name, marks=RAY if name == "ray" else ()) for name in plugins.names("executors")]
KNOWN_WORKERS = ("local", "ray")
WITH_WORKERS = [param for param in EXECUTORS if param.values != ("inline",)]


@pytest.fixture(params=EXECUTORS)
def build(request: pytest.FixtureRequest) -> Iterator[Build]:
    yield from builder(request)


@pytest.fixture(params=WITH_WORKERS)
def build_workers(request: pytest.FixtureRequest) -> Iterator[Build]:
    """Executors that evaluate in other processes; a new file is asked where it does."""
    for make in builder(request):
        if request.param not in KNOWN_WORKERS and answer(make(where_am_i)).metrics["pid"] == os.getpid():
            pytest.skip("it evaluates in this process")
        yield make


def builder(request: pytest.FixtureRequest) -> Iterator[Build]:
    if request.param == "ray":
        request.getfixturevalue("cluster")
    with contextlib.ExitStack() as stack:

        def make(factory: EvaluatorFactory, **settings: object) -> Executor:
            if request.param == "ray":
                settings.setdefault("workers", 1)  # an actor takes seconds to start
            executor: Executor = plugins.load("executors", request.param)(factory, **settings)
            stack.callback(executor.close)
            return executor

        yield make


class Crash:
    """Loses its worker the first `times` times, counted in a folder: it is killed, hangs or raises."""

    def __init__(self, folder: Path, times: int, how: str = "die") -> None:
        self.folder, self.times, self.how = folder, times, how

    def __call__(self) -> Evaluator:
        return self.evaluate

    def evaluate(self, ask: Ask) -> Evaluation:
        tries = len(list(self.folder.iterdir()))
        (self.folder / str(tries)).touch()
        if tries < self.times:
            {"die": kill, "hang": hang, "raise": fail}[self.how]()
        return Hills(STRUCTURE)(ask)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(60)


def fail() -> None:
    raise OSError("the disk hiccups")


def where_am_i() -> Evaluator:
    return lambda ask: Evaluation(ask, 1.0, {"macs": 1.0}, {"pid": os.getpid()})


def die() -> Evaluator:
    os._exit(3)


def broken() -> Hills:
    raise InputError("the weights file is truncated")


def crashing() -> Hills:
    raise ZeroDivisionError("two\nlines")


def test_every_ask_is_answered_once_with_its_own_evaluation(build: Build) -> None:
    executor = build(MakeHills(STRUCTURE))
    assert executor.slots >= 1
    for index, ask in enumerate(ASKS):
        executor.submit(100 + index, ask)
    answers = [executor.next_done() for _ in ASKS]
    found = {index: e for index, e in (a for a in answers if a is not None)}
    assert found == {100 + i: Hills(STRUCTURE)(ask) for i, ask in enumerate(ASKS)}
    assert executor.next_done(timeout=0.01) is None


def test_an_exception_in_the_evaluator_is_a_failed_evaluation_of_one_line(build: Build) -> None:
    executor = build(MakeHills(STRUCTURE, fail_share=1.0))
    executor.submit(0, ASKS[0])
    answer = executor.next_done()
    assert answer is not None
    assert answer[1].ask == ASKS[0]
    assert answer[1].error == f"FloatingPointError: the loss of {ASKS[0].policy.digest} is not finite"


def test_a_cancelled_ask_is_never_answered(build: Build, tmp_path: Path) -> None:
    executor = build(MakeHills(STRUCTURE, seconds=0.05))
    for index, ask in enumerate(ASKS):
        executor.submit(index, ask)
    for index in range(1, len(ASKS) - 1):
        executor.cancel(index)
    answers = [executor.next_done(), executor.next_done()]
    assert sorted(a[0] for a in answers if a is not None) == [0, len(ASKS) - 1]
    assert executor.next_done(timeout=0.01) is None


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        (broken, InputError, "the weights file is truncated"),
        (crashing, (RunError, ZeroDivisionError), "two"),
    ],
)
def test_a_factory_that_fails_is_an_error_here(
    build: Build, factory: EvaluatorFactory, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):  # noqa: PT012 - it may come at either step
        executor = build(factory)
        executor.submit(0, ASKS[0])
        executor.next_done()


def answer(executor: Executor) -> Evaluation:
    executor.submit(0, ASKS[0])
    done = executor.next_done()
    assert done is not None
    return done[1]


def test_an_ask_over_which_the_evaluator_raised_is_tried_again(build: Build, tmp_path: Path) -> None:
    executor = build(Crash(tmp_path, times=2, how="raise"), retries=2)
    assert answer(executor) == Hills(STRUCTURE)(ASKS[0])
    assert (len(list(tmp_path.iterdir())), executor.retried) == (3, 2)


def test_an_evaluator_that_raises_every_time_fails_with_its_reason(build: Build, tmp_path: Path) -> None:
    executor = build(Crash(tmp_path, times=2, how="raise"), retries=1)
    assert answer(executor).error == "OSError: the disk hiccups"
    assert answer(executor).ok


def test_an_ask_whose_worker_died_is_tried_again(build_workers: Build, tmp_path: Path) -> None:
    executor = build_workers(Crash(tmp_path, times=2), workers=1, retries=2)
    assert answer(executor) == Hills(STRUCTURE)(ASKS[0])
    assert (len(list(tmp_path.iterdir())), executor.retried) == (3, 2)


def test_an_ask_that_kills_every_worker_fails_and_the_next_one_is_served(build_workers: Build, tmp_path: Path) -> None:
    executor = build_workers(Crash(tmp_path, times=2), workers=1, retries=1)
    error = answer(executor).error
    assert error is not None
    assert error.startswith("the worker died (")
    assert error.endswith(", 2 times")
    assert answer(executor).ok


def test_a_hung_worker_is_replaced_after_the_timeout(build_workers: Build, tmp_path: Path) -> None:
    executor = build_workers(Crash(tmp_path, times=1, how="hang"), workers=1, timeout_s=0.5, retries=0)
    assert answer(executor).error == "no answer within 0.5 s"
    assert answer(executor).ok


@pytest.mark.parametrize("how", ["die", "hang"])
def test_only_the_ask_that_lost_its_worker_is_blamed(build_workers: Build, tmp_path: Path, how: str) -> None:
    executor = build_workers(Crash(tmp_path, times=1, how=how), workers=1, timeout_s=2.0, retries=0)
    for index, ask in enumerate(ASKS):
        executor.submit(index, ask)
    answers = dict(a for a in (executor.next_done() for _ in ASKS) if a is not None)
    assert [answers[i].ok for i in range(len(ASKS))] == [False] + [True] * (len(ASKS) - 1)
    assert len(list(tmp_path.iterdir())) == len(ASKS)


def test_workers_that_never_get_ready_are_a_run_error(build_workers: Build) -> None:
    with pytest.raises(RunError, match="are lost before they are ready"):
        answer(build_workers(die, workers=1, retries=1))


def test_workers_tell_how_they_are_doing(build: Build) -> None:
    executor = build(MakeHills(STRUCTURE, seconds=0.01))
    for index, ask in enumerate(ASKS):
        executor.submit(index, ask)
    for _ in ASKS:
        executor.next_done()
    states = executor.workers()
    assert len(states) == executor.slots
    assert len({w.name for w in states}) == len(states)
    assert sum(w.done for w in states) == len(ASKS)
    assert sum(w.busy_s for w in states) >= 0.01 * len(ASKS)
    assert executor.retried == 0


def test_asks_can_be_submitted_after_a_pause(build: Build) -> None:
    executor = build(MakeHills(STRUCTURE))
    for ask in ASKS[:3]:
        executor.submit(0, ask)
        answer = executor.next_done()
        assert answer is not None
        assert answer[1].ask == ask
