"""Zeros of masked weights stay exact zeros through a course, whatever trains; masks that move take all else along."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.evaluator.finetune import Course, Recipe
from autoprune.evaluator.optimizers import OptimizerChoice, known
from autoprune.tracing.rounding import nearest
from tests.evaluator.test_finetune import lesson_of
from tests.small import World, nonzeros, student_of, thin, world

STEPS = 4
DENSITY = 0.3


@pytest.fixture(scope="module")
def w() -> World:
    return world("projection", samples=256)


class Remembering(torch.optim.Optimizer):
    """One of a user's own, which moves weights by copies of its own: half of the way back to them after each step."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self._own = [[p.detach() + 0.1 for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, own in zip(self.param_groups, self._own, strict=True):
            for p, kept in zip(group["params"], own, strict=True):
                p.add_(p.grad, alpha=-group["lr"]).lerp_(kept, 0.5)


NAMES = [name for name in known() if name not in ("lbfgs", "sparseadam", "muon")]
RECIPES: Mapping[str, Recipe] = {
    **{name: Recipe(1e-3, optimizer=OptimizerChoice(name)) for name in NAMES},
    "momentum and decay": Recipe(0.02, optimizer=OptimizerChoice("sgd", {"momentum": 0.95}, weight_decay=0.1)),
    "decoupled decay": Recipe(1e-3, optimizer=OptimizerChoice("adamw", weight_decay=0.5), ema=0.9),
    "of one's own": Recipe(0.01, optimizer=OptimizerChoice(f"{__name__}:Remembering")),
    "average": Recipe(0.02, ema=0.9),
    "running": Recipe(0.02, running=True, max_norm=None),
}


@pytest.mark.parametrize("how", list(RECIPES))
def test_no_optimizer_moves_a_zero(w: World, how: str) -> None:
    student = thin(student_of(w), DENSITY)
    start, given = copy.deepcopy(student.state_dict()), nonzeros(student)
    lesson = lesson_of(w)
    course = Course(student, replace(lesson, sites={}) if how == "running" else lesson, STEPS, 0, recipe=RECIPES[how])
    for step in range(STEPS):
        course.advance(1)
        assert nonzeros(student) == given, step
    for name, p in student.named_parameters():
        assert not torch.equal(p, start[name]), name
        if p.dim() > 1:
            assert bool((p[start[name] == 0] == 0).all())
    state = course.state_dict()
    average = {} if state["average"] is None else state["average"]["weights"]
    assert all(bool((average[n][start[n] == 0] == 0).all()) for n in given if average), "of the weights that train"


@pytest.mark.parametrize("how", ["bf16", "parts", "8 bits"])
def test_nor_do_a_narrow_forward_a_batch_in_parts_and_8_bits(w: World, how: str) -> None:
    student = thin(student_of(w), DENSITY)
    if how == "8 bits":
        for p in student.parameters():
            if p.dim() > 1:
                p.data = nearest(p.detach()).weight
    start, given = copy.deepcopy(student.state_dict()), nonzeros(student)
    lesson = replace(lesson_of(w), precision="bf16") if how == "bf16" else lesson_of(w)
    course = Course(student, lesson, STEPS, 0, 16 if how == "parts" else 128, Recipe(0.02, ema=0.9))
    course.advance(STEPS)
    for name, p in student.named_parameters():
        if p.dim() > 1:
            assert bool((p[start[name] == 0] == 0).all())
            assert how == "8 bits" or nonzeros(student)[name] == given[name]
    if how == "8 bits":
        assert all(
            bool((e[start[n] == 0] == 0).all()) for e, n in zip(course.state_dict()["exact"][0], given, strict=True)
        )


def test_a_weight_that_the_mask_left_no_whole_zero_in_is_held_where_the_lesson_says_so(w: World) -> None:
    name = max(nonzeros(w.model), key=lambda n: w.model.get_parameter(n).numel())
    for said, held in ((frozenset[str](), False), (frozenset({name}), True)):
        student = student_of(w)
        with torch.no_grad():
            student.get_parameter(name)[:2] = 0.0
        course = Course(student, replace(lesson_of(w), patterned=said), STEPS, 0)
        course.advance(STEPS)
        assert bool((student.get_parameter(name)[:2] == 0).all()) is held


def first_of(mask: Tensor, count: int) -> Tensor:
    flat = torch.zeros(mask.numel(), dtype=torch.bool)
    flat[:count] = True
    return flat.view(mask.shape)


def moving(name: str, seen: list[int]) -> Callable[..., Mapping[str, Tensor] | None]:
    """At step 1 the first half of a weight stays, at step 3 the other half."""

    def masks(step: int, parameters: Mapping[str, nn.Parameter], held: Mapping[str, Tensor]) -> Any:
        seen.append(step)
        weight = parameters[name]
        assert weight.grad is not None
        if step > 1:
            assert bool((weight.grad[~held[name]] != 0).any()), "gradients of zeros are shown"
        half = first_of(weight, weight.numel() // 2)
        return {1: {name: half}, 3: {name: ~half}}.get(step)

    return masks


@pytest.mark.parametrize("stop", [None, 1, 2, 3])
def test_a_mask_that_moves_takes_momentum_and_average_along_and_is_gone_on_with(w: World, stop: int | None) -> None:
    name = max(nonzeros(w.model), key=lambda n: w.model.get_parameter(n).numel())
    recipe, student, seen = Recipe(0.02, ema=0.9), student_of(w), list[int]()
    course = Course(student, lesson_of(w), 5, 0, recipe=recipe)
    course.follow(moving(name, seen))
    half = first_of(w.model.get_parameter(name), w.model.get_parameter(name).numel() // 2)
    for done in range(1, 6):
        course.advance(1)
        weight, state = student.get_parameter(name), course.state_dict()
        gone = {1: torch.zeros_like(half), 2: ~half, 3: ~half}.get(done, half)
        momentum = state["optimizer"]["state"][list(dict(student.named_parameters())).index(name)]["momentum_buffer"]
        assert bool((momentum[gone] == 0).all()), done
        for value in (weight, state["average"]["weights"][name]):
            assert bool((value[gone] == 0).all()), done
            assert not bool((torch.signbit(value) & gone).any()), "a zero with a sign is another number on disk"
        if done == stop:
            file, student = io.BytesIO(), copy.deepcopy(student)
            torch.save(state, file)
            file.seek(0)
            course = Course(student, lesson_of(w), 5, 0, recipe=recipe)
            course.follow(moving(name, seen))
            course.load_state_dict(torch.load(file, weights_only=True))
    assert seen == [0, 1, 2, 3, 4]
    whole = student_of(w)
    straight = Course(whole, lesson_of(w), 5, 0, recipe=recipe)
    straight.follow(moving(name, []))
    straight.advance(5)
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in whole.state_dict().items())
