"""The one search loop, its record (an Optuna study) and its resume by replay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from threadpoolctl import ThreadpoolController

from autoprune.errors import InputError, OutOfTimeError, RunError
from autoprune.evaluation import Ask, Evaluation
from autoprune.protocols import Executor, Sampler
from autoprune.record.record import Record, Stage
from autoprune.record.storage import versions
from autoprune.run.clock import Clock
from autoprune.run.ledger import Ledger


def search_loop(
    record: Record,
    executor: Executor,
    sampler: Sampler,
    ledger: Ledger,
    window: int = 16,
    first: int = 0,
    clock: Clock | None = None,
) -> Iterator[Evaluation]:
    """Run `sampler` until the `ledger` is spent; yields the evaluations as they are told, in ask order.

    Ask i happens exactly after tell i - window, so the run is the same whatever the number and speed of the workers,
    and on resume the record answers the asks that it holds. A policy that was evaluated before is not evaluated again.
    Asks are numbered from `first` on, behind those of the seeds. Where `clock` says that the time is over, the loop
    ends with what has been told.

    Raises:
        RunError: the sampler does not repeat what the record holds (names the versions), or the executor failed.
    """
    if window < 1:
        raise InputError(f"search.window must be at least 1, not {window}")
    flight = _Flight(record, executor, "search", clock)
    # samplers' matrices are small: more threads would wait for one another, on cores that the workers need
    alone = partial(ThreadpoolController().limit, limits=1, user_api="blas")
    asked = told = 0

    def fill(limit: int) -> int:
        index = asked
        while index < limit and ledger.may_ask(("search", first + index) in record.evaluations):
            with alone():
                ask = sampler.ask()
            ledger.charge(ask)
            flight.start(first + index, ask)
            index += 1
        return index

    try:
        asked = fill(window)
        while told < asked:
            evaluation = flight.result(first + told)
            with alone():
                sampler.tell(evaluation)
            ledger.told(evaluation)
            told += 1
            asked = fill(told + window)  # here and not after the yield: workers stay busy during the caller's turn
            yield evaluation
    except OutOfTimeError as error:
        ledger.stopped = str(error)
    finally:
        flight.abandon()


def evaluate_all(
    record: Record,
    executor: Executor,
    asks: Sequence[tuple[str, Ask]],
    stage: Stage,
    clock: Clock | None = None,
) -> Iterator[Evaluation]:
    """Evaluate a fixed list of (label, ask); yields in its order. What the record holds already is not repeated.

    Raises:
        OutOfTimeError: `clock` says that the time is over.
    """
    flight = _Flight(record, executor, stage, clock)
    recorded = {(record.labels[key], e.ask): key[1] for key, e in record.evaluations.items() if key[0] == stage}
    taken = {index for kind, index in record.evaluations if kind == stage}
    # the list is numbered on from what other lists of the stage have used, so a resumed run numbers it alike
    first = max(taken - {recorded[item] for item in asks if item in recorded}, default=-1) + 1
    indices: list[int] = []
    try:
        for position, (label, ask) in enumerate(asks):
            index = recorded.get((label, ask), first + position)
            while (label, ask) not in recorded and index in taken:  # an older list, of fewer trials, held some of these
                index += len(asks)
            flight.start(index, ask, label)
            indices.append(index)
        for index in indices:
            yield flight.result(index)
    finally:
        flight.abandon()


class _Flight:
    """The asks of one stage that are under way: answers from the record, else from the executor, each ask once."""

    def __init__(self, record: Record, executor: Executor, stage: Stage, clock: Clock | None = None) -> None:
        self._record = record
        self._clock = clock or Clock(None)
        self._executor = executor
        self._stage: Stage = stage
        self._asks: dict[int, tuple[str, Ask]] = {}
        self._leader: dict[Ask, int] = {}  # the index under which an ask is being evaluated
        self._followers: dict[int, list[int]] = {}  # equal asks that wait for it

    def start(self, index: int, ask: Ask, label: str = "") -> None:
        record = self._record
        self._asks[index] = (label, ask)
        recorded = record.evaluations.get((self._stage, index))
        if recorded is not None:
            if recorded.ask != ask:
                raise RunError(_mismatch(index, recorded.ask, ask, record.versions))
        elif ask in record.known:
            record.add(index, _again(record.known[ask]), self._stage, label)
        elif ask in self._leader:
            self._followers[self._leader[ask]].append(index)
        elif not self._clock.out:
            self._leader[ask], self._followers[index] = index, []
            self._executor.submit(index, ask)
        self._drain()

    def result(self, index: int) -> Evaluation:
        while (self._stage, index) not in self._record.evaluations:
            self._clock.check()  # between two answers, so that whatever a call is given, it gets some
            if not self._settle(timeout=None):
                raise RunError(f"the executor has no answer to ask {index} and is not working on it")
        return self._record.evaluations[self._stage, index]

    def abandon(self) -> None:
        """Cancel what is under way; a later run asks again. What is finished is kept."""
        self._drain()
        for index in reversed(self._leader.values()):  # waiting ones first, or they would start again
            self._executor.cancel(index)
        self._leader.clear()

    def _drain(self) -> None:
        """What finished meanwhile is on disk at once."""
        while self._settle(timeout=0):
            pass

    def _settle(self, timeout: float | None) -> bool:
        """Record the next finished evaluation and those that waited for it."""
        finished = self._executor.next_done(timeout) if self._leader else None
        if finished is None:
            return False
        index, evaluation = finished
        label, ask = self._asks[index]
        evaluation = replace(evaluation, ask=ask)
        del self._leader[ask]
        self._record.add(index, evaluation, self._stage, label)
        for follower in self._followers.pop(index):
            self._record.add(follower, _again(evaluation), self._stage, self._asks[follower][0])
        return True


def _again(evaluation: Evaluation) -> Evaluation:
    """The same answer for an equal ask: nothing was computed for it."""
    return replace(evaluation, passes=0.0, seconds=0.0)


def _mismatch(index: int, recorded: Ask, ask: Ask, then: Mapping[str, str]) -> str:
    now = versions()
    changed = [f"{name} {old} -> {now.get(name)}" for name, old in then.items() if now.get(name) != old]
    why = f"changed since: {', '.join(changed)}" if changed else f"versions are the same: {now}"
    return (
        f"cannot resume: ask {index} was policy {recorded.policy.digest} ({recorded.tier}, {recorded.fraction:g}) in "
        f"the record and is {ask.policy.digest} ({ask.tier}, {ask.fraction:g}) now; {why}; go back, or use --fresh"
    )
