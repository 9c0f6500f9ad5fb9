"""A time limit holds for every stage; what was computed is kept, and the same command goes on until it is through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autoprune.errors import OutOfTimeError
from autoprune.front import Front
from autoprune.run import run as rooms
from autoprune.run.clock import Clock
from autoprune.run.run import Run, search
from tests.killable_compare import tiny_job

EVALUATOR = {"finalists": 2, "finetune_steps": 2, "fitness": "auto"}
JOB: dict[str, Any] = {"search": {"trials": 6, "sampler": "evolution", "time_limit_s": 60.0}, "evaluator": EVALUATOR}


class Few(Clock):
    """A clock that has run down when it was looked at `looks` times, so that no test depends on the time."""

    looks = 0

    def check(self) -> None:
        Few.looks -= 1
        if Few.looks < 0:
            raise OutOfTimeError("the time limit is reached (search.time_limit_s: 60)")

    @property
    def left_s(self) -> float:
        return 60.0 if Few.looks > 0 else 0.0

    def sooner(self, seconds: float) -> Clock:
        return self

    def again(self) -> Clock:
        return self


def figures(front: Front) -> list[Any]:
    return [(p.policy, dict(p.costs), {k: dict(v) for k, v in p.metrics.items()}, p.trial) for p in front]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return search(tiny_job(**JOB), out=tmp_path_factory.mktemp("whole")).finish()


def test_calls_that_are_cut_short_wherever_it_may_be_end_as_one_that_was_not(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "Clock", Few)
    said, stages, front = [], set(), None
    for _ in range(400):
        Few.looks = 5
        try:
            run = search(tiny_job(**JOB), out=tmp_path).finish()
        except OutOfTimeError as error:
            said.append(str(error))
            continue
        front = run.front
        if "time limit" not in run.note:
            break
        stages.add(run.note.split(";")[0].split(" after ")[0])
    assert front is not None
    assert figures(front) == figures(whole.front)
    assert [(t.params, t.user_attrs["stage"]) for t in run.study.trials if t.user_attrs["stage"] == "search"] == [
        (t.params, t.user_attrs["stage"]) for t in whole.study.trials if t.user_attrs["stage"] == "search"
    ]
    assert all("before there is a front; what was computed is kept, and the same command goes on" in s for s in said)
    named = {s.split("in the stage '")[1].split("'")[0] for s in said}
    assert {"sensitivity table", "choice of the tier", "control arms and seeds"} <= named
    assert any("validation" in stage or "fine-tuned" in stage for stage in stages)


def test_the_preparation_ends_by_the_limit_too_and_goes_on(tmp_path: Path) -> None:
    with pytest.raises(OutOfTimeError, match="in the stage 'analysis', before there is a front") as caught:
        search(tiny_job(search={**JOB["search"], "time_limit_s": 1e-6}), out=tmp_path)
    assert "\n" not in str(caught.value)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["event"] == "stopped"
    assert len(search(tiny_job(**JOB), out=tmp_path).front) > 0


def test_a_clock_counts_from_its_call_on() -> None:
    now = [5.0]
    clock = Clock(10.0, lambda: now[0])
    early = clock.sooner(4.0)
    now[0] = 11.0
    assert (clock.left_s, clock.out, early.out) == (4.0, False, True)
    with pytest.raises(OutOfTimeError, match=r"search\.time_limit_s: 10"):
        early.check()
    assert clock.again().left_s == 10.0
    assert not Clock(None, lambda: now[0]).out


def test_the_search_leaves_time_for_what_comes_after_it(tmp_path: Path) -> None:
    ends = []

    class Watched(Clock):
        def for_search(self, limit_s: float | None, spent_s: float | None, rest_s: float) -> Clock:
            ends.append(super().for_search(limit_s, spent_s, rest_s).left_s)
            return self

    run = search(tiny_job(**JOB), out=tmp_path)
    run._clock = clock = Watched(1e6, lambda: 0.0)
    run.finish()
    assert 0.5e6 <= ends[0] < clock.left_s
