"""The one search loop and its record: order, cache, failures, replay, growth, locks and damage."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from threadpoolctl import threadpool_info, threadpool_limits

from autoprune.errors import InputError, RunError
from autoprune.evaluation import Ask, Evaluation
from autoprune.executors.inline import Inline
from autoprune.policy import Policy
from autoprune.protocols import Sampler
from autoprune.record.record import Record, Stage
from autoprune.record.storage import JOURNAL
from autoprune.run.loop import evaluate_all, search_loop
from autoprune.samplers import build_sampler
from tests.synthetic import Asks, Hills, MakeHills, chain, make_problem

STRUCTURE = chain(5)
PROBLEM = make_problem(STRUCTURE)
POLICIES = [
    Policy.from_array(STRUCTURE, [g.grid[-1 - i % 3] for g in STRUCTURE.groups[:-1]] + [i + 1]) for i in range(8)
]


class Script:
    """A sampler that asks from a list and notes what happened in which order."""

    def __init__(self, asks: list[Ask]) -> None:
        self.asks, self.events = iter(asks), list[str]()
        self.n_asked = self.n_told = 0

    def ask(self) -> Ask:
        self.events.append(f"ask {self.n_asked}")
        self.n_asked += 1
        return next(self.asks)

    def tell(self, evaluation: Evaluation) -> None:
        self.events.append(f"tell {self.n_told}")
        self.n_told += 1


class Shuffled:
    """An executor that answers in random order, as workers of unequal speed do."""

    slots = 4

    def __init__(self, seed: int, evaluate: Hills) -> None:
        self._chance, self._evaluate = random.Random(seed), evaluate
        self._waiting: list[tuple[int, Ask]] = []

    def submit(self, index: int, ask: Ask) -> None:
        self._waiting.append((index, ask))

    def next_done(self, timeout: float | None = None) -> tuple[int, Evaluation] | None:
        if not self._waiting or (timeout == 0 and self._chance.random() < 0.5):
            return None
        index, ask = self._waiting.pop(self._chance.randrange(len(self._waiting)))
        return index, self._evaluate(ask)

    def cancel(self, index: int) -> None:
        self._waiting = [w for w in self._waiting if w[0] != index]

    def close(self) -> None:
        self._waiting = []


def evolution() -> Sampler:
    return build_sampler("evolution", PROBLEM, np.random.default_rng(0), {})


def timeless(evaluations: list[Evaluation]) -> list[Evaluation]:
    return [replace(e, seconds=0.0) for e in evaluations]


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Record]:
    with Record(tmp_path, STRUCTURE, ("macs",)) as opened:
        yield opened


def test_ask_i_happens_exactly_after_tell_i_minus_window(record: Record) -> None:
    sampler = Script([Ask(p, "refit") for p in POLICIES])
    list(search_loop(record, Shuffled(0, Hills(STRUCTURE)), sampler, Asks(6), window=3))
    expected = ["ask 0", "ask 1", "ask 2"]
    expected += ["tell 0", "ask 3", "tell 1", "ask 4", "tell 2", "ask 5", "tell 3", "tell 4", "tell 5"]
    assert sampler.events == expected


def test_the_run_is_the_same_whatever_the_order_of_the_workers(tmp_path: Path) -> None:
    def run(name: str, executor: Inline | Shuffled) -> list[Evaluation]:
        with Record(tmp_path / name, STRUCTURE, ("macs",)) as record:
            return list(search_loop(record, executor, evolution(), Asks(40)))

    runs = [run(str(seed), Shuffled(seed, Hills(STRUCTURE))) for seed in range(3)]
    assert timeless(runs[0]) == timeless(runs[1]) == timeless(runs[2])
    assert timeless(runs[0]) == timeless(run("inline", Inline(MakeHills(STRUCTURE))))


def test_a_repeated_policy_is_not_evaluated_twice(record: Record, tmp_path: Path) -> None:
    ask, other = Ask(POLICIES[0], "refit"), Ask(POLICIES[1], "refit")
    asks = [ask, ask, other, ask, replace(ask, fraction=0.5), replace(ask, tier="tune"), ask]
    executor = Inline(MakeHills(STRUCTURE, log=str(tmp_path / "log")))
    seeds = list(evaluate_all(record, executor, [("uniform@0.5", other)], "seed"))
    told = list(search_loop(record, executor, Script(asks), Asks(len(asks)), window=2))
    assert [e.passes for e in told] == [1.0, 0, 0, 0, 0.5, 1.0, 0]
    assert {e.loss for e, a in zip(told, asks, strict=True) if a == ask} == {told[0].loss}
    assert told[2].loss == seeds[0].loss
    assert len((tmp_path / "log").read_text().splitlines()) == 4


def test_failed_evaluations_are_told_too_and_recorded_with_their_reason(record: Record) -> None:
    executor = Inline(MakeHills(STRUCTURE, fail_share=1.0))
    sampler = Script([Ask(p, "refit") for p in POLICIES])
    told = list(search_loop(record, executor, sampler, Asks(3)))
    assert sampler.n_told == 3
    assert [e.ok for e in told] == [False] * 3
    trial = record.study.get_trials()[0]
    assert (trial.state, trial.user_attrs["error"]) == (TrialState.FAIL, told[0].error)


def test_more_trials_extend_a_run_and_its_beginning_is_not_evaluated_again(tmp_path: Path) -> None:
    def run(name: str, n_trials: int, log: str) -> list[Evaluation]:
        with Record(tmp_path / name, STRUCTURE, ("macs",)) as record:
            executor = Inline(MakeHills(STRUCTURE, log=str(tmp_path / log)))
            told = list(search_loop(record, executor, evolution(), Asks(n_trials)))
            finals = [(f"final {i}", Ask(e.ask.policy, "tune")) for i, e in enumerate(told[-3:])]
            return told + list(evaluate_all(record, executor, finals, "final"))

    short = run("grown", 25, "short.log")
    grown = run("grown", 40, "grown.log")
    whole = run("whole", 40, "whole.log")
    assert timeless(grown) == timeless(whole)
    assert timeless(grown)[:25] == timeless(short)[:25]
    logs = {name: (tmp_path / f"{name}.log").read_text().splitlines() for name in ("short", "grown", "whole")}
    assert len(set(logs["short"]) & set(logs["grown"])) == 0
    assert set(logs["whole"]) <= {*logs["short"], *logs["grown"]}


def test_a_sampler_that_does_not_repeat_its_record_is_an_error_that_names_the_versions(tmp_path: Path) -> None:
    asks = [Ask(p, "refit") for p in POLICIES]
    with Record(tmp_path, STRUCTURE, ("macs",)) as record:
        list(search_loop(record, Inline(MakeHills(STRUCTURE)), Script(asks), Asks(4)))
        record.study.set_user_attr("versions", {**record.versions, "optuna": "1.2.3"})
    with Record(tmp_path, STRUCTURE, ("macs",)) as record:
        changed = Script([*asks[:2], asks[7]])
        with pytest.raises(RunError, match=r"ask 2 was policy \w{12}.*optuna 1\.2\.3 -> "):
            list(search_loop(record, Inline(MakeHills(STRUCTURE)), changed, Asks(3)))


def test_the_record_is_an_optuna_study_with_states_values_and_attributes(record: Record, tmp_path: Path) -> None:
    asks = [Ask(POLICIES[0], "refit"), Ask(POLICIES[1], "refit", 0.5), Ask(POLICIES[2], "stitch")]
    told = list(search_loop(record, Inline(MakeHills(STRUCTURE)), Script(asks), Asks(3)))
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / JOURNAL))
    study = optuna.load_study(study_name="autoprune", storage=optuna.storages.JournalStorage(backend))
    trials = study.get_trials()
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]
    assert trials[0].values == [told[0].loss, told[0].costs["macs"]]
    assert trials[0].params == POLICIES[0].as_dict()
    attributes = ("stage", "ask", "tier", "fraction", "split", "passes")
    assert [trials[1].user_attrs[a] for a in attributes] == ["search", 1, "refit", 0.5, "fitness", 0.5]
    assert study.metric_names == ["loss", "macs"]


def test_what_is_recorded_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    with Record(tmp_path, STRUCTURE, ("macs",)) as record:
        list(
            evaluate_all(
                record, Inline(MakeHills(STRUCTURE, fail_share=0.3)), [("a", Ask(p, "refit")) for p in POLICIES], "seed"
            )
        )
        before, labels = record.evaluations, record.labels
    with Record(tmp_path, STRUCTURE, ("macs",)) as record:
        assert record.evaluations == before
        assert record.labels == labels
        assert record.known == {e.ask: e for e in before.values()}


@pytest.mark.parametrize("torn", [b'{"op_code":4,"worker', b"\x00\x00\x00\n", b"}"])
def test_a_torn_last_line_is_cut_and_nothing_else_is_lost(tmp_path: Path, torn: bytes) -> None:
    with Record(tmp_path, STRUCTURE, ("macs",)) as record:
        list(search_loop(record, Inline(MakeHills(STRUCTURE)), evolution(), Asks(5)))
        before = record.evaluations
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(torn)
    with Record(tmp_path, STRUCTURE, ("macs",)) as record:
        assert record.evaluations == before
        told = list(search_loop(record, Inline(MakeHills(STRUCTURE)), evolution(), Asks(6)))
    with Record(tmp_path, STRUCTURE, ("macs",)) as record:
        assert record.evaluations["search", 5] == told[5]


def test_a_journal_damaged_in_the_middle_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with Record(tmp_path, STRUCTURE, ("macs",)) as record:
        list(search_loop(record, Inline(MakeHills(STRUCTURE)), evolution(), Asks(5)))
    journal = tmp_path / JOURNAL
    content = journal.read_bytes().replace(b'"stage"', b'"sta', 1)
    journal.write_bytes(content)
    with pytest.raises(InputError, match=r"study\.journal: it is damaged .*--fresh"):
        Record(tmp_path, STRUCTURE, ("macs",))
    assert journal.read_bytes() == content


def test_a_folder_in_use_is_refused_and_its_holder_named(record: Record, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is in use by process \d+ on "):
        Record(tmp_path, STRUCTURE, ("macs",))
    record.close()
    Record(tmp_path, STRUCTURE, ("macs",)).close()


def test_a_record_of_other_objectives_is_refused(record: Record, tmp_path: Path) -> None:
    record.close()
    with pytest.raises(InputError, match="records loss, macs, this job has loss, params"):
        Record(tmp_path, STRUCTURE, ("params",))


def test_lists_of_one_stage_are_numbered_on_and_a_resumed_list_is_numbered_alike(tmp_path: Path) -> None:
    first = [(f"heldback {i}", Ask(p, "refit", split="heldback")) for i, p in enumerate(POLICIES[:3])]
    second = [(f"validation {i}", Ask(p, "tune", split="validation")) for i, p in enumerate(POLICIES[2:6])]

    def run(name: str, n_second: int) -> dict[tuple[Stage, int], str]:
        with Record(tmp_path / name, STRUCTURE, ("macs",)) as record:
            executor = Inline(MakeHills(STRUCTURE))
            told = list(evaluate_all(record, executor, first, "final"))
            told += list(itertools.islice(evaluate_all(record, executor, second, "final"), n_second))
            assert [e.ask for e in told] == [ask for _, ask in [*first, *second][: len(told)]]
            return dict(record.labels)

    run("stopped", 2)
    assert run("stopped", 4) == run("whole", 4)
    assert sorted(index for _, index in run("whole", 4)) == list(range(7))


@pytest.mark.skipif(not threadpool_info(), reason="numpy's BLAS does not say how many threads it has")
def test_samplers_compute_in_one_thread_and_leave_the_caller_his(record: Record) -> None:
    class Counting(Script):
        def __init__(self, asks: list[Ask]) -> None:
            super().__init__(asks)
            self.threads: list[int] = []

        def ask(self) -> Ask:
            self.threads += blas_threads()
            return super().ask()

        def tell(self, evaluation: Evaluation) -> None:
            self.threads += blas_threads()
            super().tell(evaluation)

    sampler, ours = Counting([Ask(p, "refit") for p in POLICIES]), []
    with threadpool_limits(2, user_api="blas"):
        for _ in search_loop(record, Inline(MakeHills(STRUCTURE)), sampler, Asks(4), window=1):
            ours += blas_threads()
    assert set(sampler.threads) == {1}
    assert set(ours) == {2}


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_leaving_the_loop_early_keeps_what_was_told_and_cancels_the_rest(record: Record) -> None:
    executor = Inline(MakeHills(STRUCTURE))
    loop = search_loop(record, executor, evolution(), Asks(30))
    first = [next(loop) for _ in range(3)]
    loop.close()  # type: ignore[attr-defined]
    assert executor.next_done() is None
    assert timeless(list(search_loop(record, executor, evolution(), Asks(30))))[:3] == timeless(first)


def test_recording_takes_milliseconds(tmp_path: Path) -> None:
    structure = chain(56)
    policies = [Policy.from_array(structure, [g.grid[-1 - i % 4] for g in structure.groups]) for i in range(4)]
    with Record(tmp_path, structure, ("macs",)) as record:
        start = time.process_time()
        for i in range(40):
            record.add(i, Hills(structure)(Ask(policies[i % 4], "refit")), "search")
        assert (time.process_time() - start) / 40 < 0.02
