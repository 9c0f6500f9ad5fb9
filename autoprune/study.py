"""The one search loop, its record (an Optuna study) and its resume by replay."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, get_args

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import TrialState
from threadpoolctl import ThreadpoolController

from autoprune.errors import InputError, RunError
from autoprune.evaluation import Ask, Evaluation, Tier
from autoprune.ledger import Ledger
from autoprune.policy import Policy
from autoprune.protocols import Executor, Sampler
from autoprune.storage import Home, find_home, open_study, versions
from autoprune.structure import Structure

Stage = Literal["table", "proxy", "seed", "search", "final"]
T = TypeVar("T")
LOCK = "study.lock"


def search_loop(
    record: Record, executor: Executor, sampler: Sampler, ledger: Ledger, window: int = 16, first: int = 0
) -> Iterator[Evaluation]:
    """Run `sampler` until the `ledger` is spent; yields the evaluations as they are told, in ask order.

    Ask i happens exactly after tell i - window, so the run is the same whatever the number and speed of the workers,
    and on resume the record answers the asks that it holds. A policy that was evaluated before is not evaluated again.
    Asks are numbered from `first` on, behind those of the seeds.

    Raises:
        RunError: the sampler does not repeat what the record holds (names the versions), or the executor failed.
    """
    if window < 1:
        raise InputError(f"search.window must be at least 1, not {window}")
    flight = _Flight(record, executor, "search")
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
    finally:
        flight.abandon()


def evaluate_all(
    record: Record, executor: Executor, asks: Sequence[tuple[str, Ask]], stage: Stage
) -> Iterator[Evaluation]:
    """Evaluate a fixed list of (label, ask); yields in its order. What the record holds already is not repeated."""
    flight = _Flight(record, executor, stage)
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


class Record:
    """The study of a run folder, held under a lock: every finished evaluation, on disk at once, and read back.

    It lives in the folder's journal, or in the database at the URL `storage` (see `autoprune.storage`).
    `identity` names what the evaluations depend on beside the job (structure, weights, data), each by a hash.
    `evaluations` maps (stage, index of the ask) to its evaluation, `labels` likewise; `known` maps each Ask to its
    first evaluation. `tier` is the fitness tier: full evaluations at it and above are COMPLETE trials, others PRUNED.
    `clock` counts the seconds that the folder has been searched in, over all sessions.

    Raises:
        InputError: another process uses the folder or the study, which is damaged or cannot be reached, or belongs to
            other objectives or to another identity.
    """

    def __init__(
        self,
        folder: Path,
        structure: Structure,
        objectives: Sequence[str],
        tier: Tier = "refit",
        identity: Mapping[str, str] | None = None,
        storage: str | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder
        self.evaluations: dict[tuple[Stage, int], Evaluation] = {}
        self.labels: dict[tuple[Stage, int], str] = {}
        self.known: dict[Ask, Evaluation] = {}
        self._objectives = tuple(objectives)
        self.tier: Tier = tier
        self._opened, self._before = time.monotonic(), 0.0
        self._distributions: dict[str, BaseDistribution] = {
            g.name: IntDistribution(g.grid[0], g.width) for g in structure.groups
        }
        self._home: Home | None = None
        self._lock = _lock(folder / LOCK)
        try:
            self._home = home = find_home(folder, storage)
            self.study = open_study(home, ("loss", *objectives), identity or {})
            self.versions: Mapping[str, str] = home.read(lambda: self.study.user_attrs["versions"])
            for trial in home.read(lambda: self.study.get_trials(deepcopy=False)):
                self._remember(*_from_trial(trial))
                self._before = max(self._before, trial.user_attrs.get("clock", 0.0))
        except BaseException:
            self.close()
            raise

    def add(self, index: int, evaluation: Evaluation, stage: Stage, label: str = "") -> None:
        """Record the answer to ask `index` of `stage`; when this returns it is on disk."""
        if (stage, index) in self.evaluations:
            raise RunError(f"ask {index} of stage {stage!r} is already recorded")
        ask, state = evaluation.ask, self._state(evaluation)
        attributes = {
            **{"ask": index, "stage": stage, "label": label, "tier": ask.tier, "fraction": ask.fraction},
            **{"split": ask.split, "passes": evaluation.passes, "seconds": evaluation.seconds},
            **{"costs": dict(evaluation.costs), "metrics": dict(evaluation.metrics), "clock": round(self.clock(), 3)},
            **({"loss": evaluation.loss} if evaluation.ok else {"error": evaluation.error}),
            **({"sample_losses": list(evaluation.sample_losses)} if evaluation.sample_losses else {}),
        }
        full = state == TrialState.COMPLETE
        trial = optuna.trial.create_trial(
            state=state,
            values=[evaluation.loss, *(evaluation.costs[c] for c in self._objectives)] if full else None,
            params=ask.policy.as_dict(),
            distributions=self._distributions,
            user_attrs=attributes,
        )
        self._written(lambda: self.study.add_trial(trial))
        self._remember(stage, index, label, evaluation)

    def clock(self) -> float:
        """Seconds that this folder's run has been open, earlier sessions up to their last evaluation included."""
        return self._before + time.monotonic() - self._opened

    def horizon(self, n_trials: int) -> int:
        """The ledger that the run was started with: a sampler's schedule keeps to it when the ledger grows."""
        held = self.fact("horizon")
        if held is None:
            self.note("horizon", n_trials)
        return n_trials if held is None else int(held)

    def fact(self, name: str) -> Any:
        """What was noted under `name` beside the trials; None where nothing was."""
        return self._written(lambda: self.study.user_attrs.get(name))

    def note(self, name: str, value: object) -> None:
        """Write a fact beside the trials, in plain JSON values."""
        if self.fact(name) != value:
            self._written(lambda: self.study.set_user_attr(name, value))

    def close(self) -> None:
        """Release the study and the folder."""
        self._home.close() if self._home is not None else None
        os.close(self._lock) if self._lock >= 0 else None
        self._lock = -1

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _written(self, action: Callable[[], T]) -> T:
        assert self._home is not None
        return self._home.write(action)

    def _state(self, evaluation: Evaluation) -> TrialState:
        if not evaluation.ok:
            return TrialState.FAIL
        order, ask = get_args(Tier).index, evaluation.ask
        full = ask.fraction == 1.0 and order(ask.tier) >= order(self.tier)
        return TrialState.COMPLETE if full else TrialState.PRUNED

    def _remember(self, stage: Stage, index: int, label: str, evaluation: Evaluation) -> None:
        self.evaluations[stage, index] = evaluation
        self.labels[stage, index] = label
        self.known.setdefault(evaluation.ask, evaluation)


class _Flight:
    """The asks of one stage that are under way: answers from the record, else from the executor, each ask once."""

    def __init__(self, record: Record, executor: Executor, stage: Stage) -> None:
        self._record = record
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
        else:
            self._leader[ask], self._followers[index] = index, []
            self._executor.submit(index, ask)
        self._drain()

    def result(self, index: int) -> Evaluation:
        while (self._stage, index) not in self._record.evaluations:
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


def _from_trial(trial: optuna.trial.FrozenTrial) -> tuple[Stage, int, str, Evaluation]:
    a: Mapping[str, Any] = trial.user_attrs
    ask = Ask(Policy.of(trial.params), a["tier"], a["fraction"], a["split"])
    loss = a.get("loss", float("inf"))
    single = tuple(a.get("sample_losses", ()))
    evaluation = Evaluation(ask, loss, a["costs"], a["metrics"], a["passes"], a["seconds"], a.get("error"), single)
    return a["stage"], a["ask"], a["label"], evaluation


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder without opening its record; InputError where another process uses it."""
    descriptor = _lock(folder / LOCK)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path) -> int:
    """Take the folder for this process; the system gives it free when the process ends, however it ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise InputError(f"{path.parent} is in use by {holder}; wait for it or choose another folder") from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _mismatch(index: int, recorded: Ask, ask: Ask, then: Mapping[str, str]) -> str:
    now = versions()
    changed = [f"{name} {old} -> {now.get(name)}" for name, old in then.items() if now.get(name) != old]
    why = f"changed since: {', '.join(changed)}" if changed else f"versions are the same: {now}"
    return (
        f"cannot resume: ask {index} was policy {recorded.policy.digest} ({recorded.tier}, {recorded.fraction:g}) in "
        f"the record and is {ask.policy.digest} ({ask.tier}, {ask.fraction:g}) now; {why}; go back, or use --fresh"
    )
