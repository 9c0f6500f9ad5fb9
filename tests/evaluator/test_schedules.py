"""The rate of every step: formulas, schedulers of torch, a user's own; stopped and gone on with."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from autoprune.errors import InputError
from autoprune.evaluator.schedules import UNFIT, ScheduleChoice, known


def optimizer(*rates: float) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates or (1.0,)]
    return torch.optim.SGD(groups, 1.0, momentum=0.9)


def rates(choice: ScheduleChoice, steps: int, own: torch.optim.Optimizer | None = None) -> list[float]:
    own = own or optimizer()
    schedule, seen = choice.build(own, steps), list[float]()
    for step in range(steps):
        schedule.before(step)
        own.step()
        seen.append(own.param_groups[-1]["lr"])
        schedule.after()
    return seen


def test_a_formula_rises_over_a_tenth_and_goes_its_way_for_every_group() -> None:
    falling = [0.5 * (1 + math.cos(math.pi * i / 18)) for i in range(18)]
    assert rates(ScheduleChoice(), 20) == pytest.approx([0.5, 1.0, *falling])
    assert rates(ScheduleChoice("linear", warmup=4), 8) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25])
    assert rates(ScheduleChoice("constant", warmup=0.0), 3) == [1.0, 1.0, 1.0]
    assert rates(ScheduleChoice("constant", warmup=0.5), 4, optimizer(1.0, 0.1)) == pytest.approx([0.05, 0.1, 0.1, 0.1])
    assert rates(ScheduleChoice(), 1) == [1.0]


def test_a_scheduler_of_torch_is_stepped_with_the_optimizer_and_a_warm_up_goes_before() -> None:
    assert rates(ScheduleChoice("steplr", {"step_size": 2}), 6) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    warm = rates(ScheduleChoice("StepLR", {"step_size": 2}, warmup=3), 6)
    assert warm == pytest.approx([1 / 3, 2 / 3, 0.1, 0.1, 0.01, 0.01])
    cosine = rates(ScheduleChoice("CosineAnnealingLR"), 10)
    assert cosine == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)])
    cycle = rates(ScheduleChoice("onecyclelr", {"pct_start": 0.5}), 10, optimizer(0.3))
    assert max(cycle) == pytest.approx(0.3)
    assert cycle[-1] < 1e-3


def early(optimizer: torch.optim.Optimizer, steps: int, share: float = 0.5) -> lr_scheduler.LRScheduler:
    return lr_scheduler.MultiStepLR(optimizer, [int(share * steps)], gamma=0.1)


def nothing(optimizer: torch.optim.Optimizer) -> int:
    return 3


def test_a_factory_is_told_the_steps_where_it_takes_them() -> None:
    found = rates(ScheduleChoice(f"{__name__}:early", {"share": 0.25}), 8)
    assert found == pytest.approx([1, 1, *[0.1] * 6])
    with pytest.raises(InputError, match="nothing gives a int without step, state_dict, load_state_dict"):
        ScheduleChoice(f"{__name__}:nothing").build(optimizer(), 4)


@pytest.mark.parametrize(
    "choice",
    [
        ScheduleChoice(),
        ScheduleChoice("onecyclelr"),
        ScheduleChoice("multisteplr", {"milestones": [2, 5]}, warmup=4),
        ScheduleChoice("cosineannealingwarmrestarts", {"T_0": 3}),
        ScheduleChoice(f"{__name__}:early"),
    ],
)
def test_gone_on_with_elsewhere_it_says_what_it_would_have_said(choice: ScheduleChoice) -> None:
    whole, first = rates(choice, 8), optimizer()
    schedule, seen = choice.build(first, 8), list[float]()
    for step in range(3):
        schedule.before(step)
        first.step()
        seen.append(first.param_groups[0]["lr"])
        schedule.after()
    file = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "schedule": schedule.state_dict()}, file)
    file.seek(0)
    state, second = torch.load(file, weights_only=True), optimizer()
    again = choice.build(second, 8)
    second.load_state_dict(state["optimizer"])
    again.load_state_dict(state["schedule"])
    for step in range(3, 8):
        again.before(step)
        second.step()
        seen.append(second.param_groups[0]["lr"])
        again.after()
    assert seen == pytest.approx(whole)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("cosin",), r"unknown scheduler 'cosin'; did you mean 'cosine'\? allowed: .*linear.*, or 'module:factory'"),
        (("ReduceLROnPlateau",), "waits for a score; patience stops"),
        (("cosine", {"T_max": 3}), "cosine takes none, not T_max"),
        (("steplr", {"stepsize": 3}), "scheduler_options: unknown option 'stepsize'; did you mean 'step_size'"),
        (("steplr",), "scheduler steplr fails: TypeError: .*step_size"),
        (("nowhere:make",), "cannot import 'nowhere'"),
    ],
)
def test_what_there_is_not_is_one_line_before_there_is_a_model(given: tuple[Any, ...], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        ScheduleChoice(*given)
    assert "\n" not in str(caught.value)


def test_torch_has_them_by_names_in_small_letters() -> None:
    assert {"steplr", "onecyclelr", "cosineannealinglr", *UNFIT} <= set(known())


def test_a_schedule_that_ends_before_its_course_is_told_before_the_first_step() -> None:
    choice = ScheduleChoice("onecyclelr", {"total_steps": 7})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9)
    with pytest.raises(InputError, match="total_steps 7 ends before the 12 steps of a course do"):
        choice.build(optimizer, 12)
    choice.build(optimizer, 7)
