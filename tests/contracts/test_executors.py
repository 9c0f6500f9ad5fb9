"""The contract of every file in autoprune/executors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from synthetic import Hills, MakeHills, chain, single_steps

from autoprune import plugins
from autoprune.errors import InputError, RunError
from autoprune.evaluation import Ask
from autoprune.policy import Policy
from autoprune.protocols import EvaluatorFactory, Executor

STRUCTURE = chain()
ASKS = [Ask(p, "refit") for p in single_steps(STRUCTURE, Policy.of({g.name: g.grid[0] for g in STRUCTURE.groups}))]
Build = Callable[[EvaluatorFactory], Executor]


@pytest.fixture(params=plugins.names("executors"))
def build(request: pytest.FixtureRequest) -> Iterator[Build]:
    with contextlib.ExitStack() as stack:

        def make(factory: EvaluatorFactory) -> Executor:
            executor: Executor = plugins.load("executors", request.param)(factory)
            stack.callback(executor.close)
            return executor

        yield make


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


def test_asks_can_be_submitted_after_a_pause(build: Build) -> None:
    executor = build(MakeHills(STRUCTURE))
    for ask in ASKS[:3]:
        executor.submit(0, ask)
        answer = executor.next_done()
        assert answer is not None
        assert answer[1].ask == ask
