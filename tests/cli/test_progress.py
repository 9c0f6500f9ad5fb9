"""When a line of progress is due, by a clock that the test sets."""

from __future__ import annotations

from autoprune.cli.progress import Teller, span


def test_a_long_stage_is_said_after_two_seconds_and_then_now_and_then() -> None:
    teller = Teller(0.0)
    said = [t for t in range(40) if teller.due("analysis", float(t), at_once=False)]
    assert said == [2, 17, 32]
    assert not teller.due("data", 40.0, at_once=False)
    assert [teller.due("search", 41.0, at_once=True), teller.due("search", 42.0, at_once=True)] == [True, False]


def test_times_are_said_as_people_say_them() -> None:
    assert [span(s) for s in (4.2, 300.0, 9000.0)] == ["4 s", "5 min", "2.5 h"]
