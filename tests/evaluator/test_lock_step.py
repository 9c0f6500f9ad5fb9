"""Forwards in lock step: one at a time, in order, each waiting where all are needed; none is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from autoprune.evaluator.lock_step import Meet, OutOfStepError, in_step


def counting(log: list[str], name: str, places: str, end: Exception | None = None) -> Callable[[Meet], int]:
    def forward(meet: Meet) -> int:
        seen = 0
        for place in places:
            log.append(f"{name}{place}")
            seen += meet(place, ord(name), sum)
        if end is not None:
            raise end
        return seen

    return forward


def test_each_runs_to_the_next_meeting_in_turn_and_all_get_what_came_of_all_pieces() -> None:
    log: list[str] = []
    found = in_step([counting(log, name, "12") for name in "abc"])
    assert log == ["a1", "b1", "c1", "a2", "b2", "c2"]
    assert found == [2 * sum(map(ord, "abc"))] * 3


def test_a_single_forward_stays_in_its_thread() -> None:
    where = list[threading.Thread]()
    assert in_step([lambda meet: where.append(threading.current_thread()) or meet("x", 3, list)]) == [[3]]
    assert where == [threading.current_thread()]


@pytest.mark.parametrize(("places", "said"), [(("12", "13"), "2, 3"), (("12", "1"), "2, 1 at their end")])
def test_those_that_do_not_meet_are_told_and_ended(places: tuple[str, str], said: str) -> None:
    before = threading.active_count()
    with pytest.raises(OutOfStepError, match=said):
        in_step([counting([], name, p) for name, p in zip("ab", places, strict=True)])
    assert threading.active_count() == before


def test_an_error_of_one_comes_out_and_the_others_end_even_where_they_catch_everything() -> None:
    caught = []

    def stubborn(meet: Meet) -> None:
        try:
            meet("1", 0, len)
        except Exception as error:  # as a user's model may
            caught.append(error)
        meet("2", 0, len)

    before = threading.active_count()
    with pytest.raises(ValueError, match="at its end"):
        in_step([stubborn, counting([], "b", "1", ValueError("at its end"))])
    with pytest.raises(ZeroDivisionError):
        in_step([lambda meet: meet("1", 1, lambda pieces: 1 // 0) for _ in range(3)])
    assert (caught, threading.active_count()) == ([], before)


def test_threads_compute_on_as_many_threads_as_the_caller() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert in_step([lambda meet: torch.get_num_threads() for _ in range(2)]) == [1, 1]
    finally:
        torch.set_num_threads(before)
