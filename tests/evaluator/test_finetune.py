"""The brief fine-tune: what is folded, split or rounded changes nothing but the time it takes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from autoprune.database.batches import Pool
from autoprune.database.drawn import Drawn
from autoprune.errors import InputError
from autoprune.evaluator.features import Features, feature_loss, noted
from autoprune.evaluator.fidelity import Fidelity
from autoprune.evaluator.finetune import Course, Lesson, Recipe, _loss
from autoprune.evaluator.material import Portion, Reading, Repeated, material_for
from autoprune.evaluator.optimizers import OptimizerChoice
from autoprune.evaluator.schedules import ScheduleChoice
from autoprune.losses.kl import kl
from autoprune.tracing.rounding import is_rounded, nearest
from autoprune.tracing.wiring import find_sites
from tests.small import World, student_of, world


def lesson_of(w: World) -> Lesson:
    samples = w.statistics
    with torch.no_grad():
        teacher = w.task.outputs(w.model, samples)
    sites = find_sites(w.model, w.task.example_inputs())
    return Lesson(Repeated(Pool(Drawn((samples,))), (teacher,)), w.task.outputs, Fidelity("kl", -1, kl), sites)


def tuned(w: World, lesson: Lesson, at_once: int = 128) -> dict[str, torch.Tensor]:
    student = student_of(w)
    assert Course(student, lesson, 4, 0, at_once).advance(4) == 4 * 64
    return dict(student.state_dict())


@pytest.mark.parametrize("family", ["projection", "mobilenet", "unet"])
def test_folding_and_parts_of_a_batch_change_the_result_by_rounding_only(family: str) -> None:
    w = world(family, samples=256)
    lesson = lesson_of(w)
    plain = tuned(w, replace(lesson, sites={}))
    for other in (tuned(w, lesson), tuned(w, lesson, at_once=16)):
        for name, value in plain.items():
            torch.testing.assert_close(other[name], value, rtol=2e-3, atol=1e-4)


def test_training_in_bfloat16_keeps_float32_weights_and_stays_close() -> None:
    w = world("projection", samples=256)
    lesson = lesson_of(w)
    exact, rounded = tuned(w, lesson), tuned(w, replace(lesson, precision="bf16"))
    start = student_of(w).state_dict()
    for name, _ in w.model.named_parameters():
        value = exact[name]
        assert rounded[name].dtype == value.dtype
        assert (rounded[name] - value).norm() <= 0.2 * (value - start[name]).norm() + 1e-6, name


def test_every_parameter_learns_and_statistics_stay() -> None:
    w = world("projection", samples=256)
    start, after = student_of(w).state_dict(), tuned(w, lesson_of(w))
    moved = {name for name in after if not torch.equal(after[name], start[name])}
    assert moved == {name for name, _ in w.model.named_parameters()}


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    w = world("plain", samples=256)
    lesson = lesson_of(w)
    assert isinstance(lesson.material, Repeated)
    wrong = torch.full_like(lesson.material.teacher[0], float("inf"))
    broken = replace(lesson, material=replace(lesson.material, teacher=(wrong,)))
    with pytest.raises(ArithmeticError, match="the fine-tuning loss is nan at step 0"):
        Course(student_of(w), broken, 2, 0).advance(2)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(0.01, 0.4),
        Recipe(0.01, 0.0),
        Recipe(0.01, ema=0.9, schedule=ScheduleChoice("onecyclelr"), running=True),
        Recipe(None, optimizer=OptimizerChoice("radam"), schedule=ScheduleChoice("steplr", {"step_size": 2}, 3)),
        Recipe(0.01, optimizer=OptimizerChoice("adadelta"), max_norm=None, schedule=ScheduleChoice("linear")),
    ],
)
def test_a_course_stopped_and_gone_on_with_elsewhere_ends_as_one_without_a_break(
    recipe: Recipe, tmp_path: Path
) -> None:
    w = world("projection", samples=256)
    lesson = replace(lesson_of(w), task_loss=w.task.loss, sites={})
    whole, broken = (nn.Sequential(student_of(w), nn.Dropout(0.5)) for _ in range(2))
    Course(whole, lesson, 5, 0, recipe=recipe).advance(5)
    first = Course(broken, lesson, 5, 0, recipe=recipe)
    first.advance(2)
    torch.save(first.state_dict(), tmp_path / "course.pt")
    other = copy.deepcopy(broken).requires_grad_(False)
    second = Course(other, lesson, 5, 0, recipe=recipe)
    second.load_state_dict(torch.load(tmp_path / "course.pt", weights_only=True))
    torch.rand(7)  # what others draw in between is no concern of the course
    assert second.advance(99) == 3 * 64
    for name, value in whole.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_an_average_is_in_the_model_and_the_weights_that_train_go_on_by_themselves() -> None:
    w = world("projection", samples=256)
    lesson, plain, averaged = lesson_of(w), student_of(w), student_of(w)
    Course(plain, lesson, 4, 0, recipe=Recipe(0.01)).advance(4)
    course = Course(averaged, lesson, 4, 0, recipe=Recipe(0.01, ema=0.99))
    course.advance(4)
    state = course.state_dict()["average"]["weights"]
    start = student_of(w)
    for name, value in plain.named_parameters():
        assert torch.equal(state[name], value), "what trains does not know of the average"
        held, first = dict(averaged.named_parameters())[name], dict(start.named_parameters())[name]
        assert (held - first).norm() < (value - first).norm()


def test_gradients_are_clipped_to_the_norm_that_was_asked_for() -> None:
    w = world("plain", samples=256)
    lesson, moved = lesson_of(w), []
    for norm in (1e-3, None):
        student = student_of(w)
        plain = OptimizerChoice("sgd", {"momentum": 0.0, "weight_decay": 0.0})
        recipe = Recipe(0.5, optimizer=plain, max_norm=norm, schedule=ScheduleChoice("constant"))
        Course(student, lesson, 1, 0, recipe=recipe).advance(1)
        pairs = zip(student.parameters(), student_of(w).parameters(), strict=True)
        moved.append(float(torch.cat([(a - b).detach().flatten() for a, b in pairs]).norm()))
    assert moved[0] == pytest.approx(0.5e-3, rel=1e-3)
    assert moved[1] > 2 * moved[0]


def test_running_norms_gather_the_statistics_of_what_is_trained_on_and_fixed_ones_keep_theirs() -> None:
    w = world("projection", samples=256)
    lesson = replace(lesson_of(w), sites={})
    kept, gathered = student_of(w), student_of(w)
    Course(kept, lesson, 3, 0).advance(3)
    Course(gathered, lesson, 3, 0, recipe=Recipe(running=True)).advance(3)
    start = student_of(w).state_dict()
    for name, value in kept.named_buffers():
        assert torch.equal(value, start[name])
    assert any(not torch.equal(value, start[name]) for name, value in gathered.named_buffers())
    assert not gathered.training


def test_features_are_taught_as_well_and_their_weight_counts() -> None:
    w = world("projection", samples=256)
    name = next(n for n, m in w.model.named_modules() if isinstance(m, nn.BatchNorm2d))
    inputs = w.task.example_inputs()
    features = Features.of([name], w.model, inputs)
    layout = torch.channels_last
    material = material_for(w.task, w.model, 8, 0, layout, Reading(features=features.names))
    lesson = replace(lesson_of(w), sites={}, material=material, features=features)

    def off(model: nn.Module) -> float:
        with torch.no_grad(), noted(model, (name,)) as mine, noted(w.model, (name,)) as theirs:
            model(w.statistics[0])
            w.model(w.statistics[0])
            return float(feature_loss(mine(), theirs(), None))

    ends = []
    for weight in (0.0, 10.0):
        student = student_of(w)
        start = off(student)
        Course(student, lesson, 8, 0, recipe=Recipe(0.02, feature_weight=weight)).advance(8)
        ends.append(off(student))
    assert ends[1] < 0.9 * ends[0]
    assert ends[1] < start


def test_a_recipe_weighs_distillation_against_the_tasks_loss() -> None:
    w = world("projection", samples=256)
    lesson = replace(lesson_of(w), task_loss=w.task.loss)
    ends = []
    for recipe in (Recipe(), Recipe(distillation=0.3), Recipe(0.001)):
        student = student_of(w)
        Course(student, lesson, 3, 0, recipe=recipe).advance(3)
        ends.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert not torch.allclose(ends[0], ends[1])
    start = torch.cat([p.detach().flatten() for p in student_of(w).parameters()])
    assert (ends[2] - start).norm() < 0.2 * (ends[0] - start).norm()
    with pytest.raises(InputError, match=r"a distillation weight of 0\.3 needs the task's own loss"):
        Course(student_of(w), lesson_of(w), 3, 0, recipe=Recipe(distillation=0.3)).advance(1)


def test_the_rate_rises_over_a_tenth_of_the_steps_and_falls_as_a_cosine_to_nothing() -> None:
    w = world("plain")
    course, rates = Course(student_of(w), lesson_of(w), 20, 0, recipe=Recipe(0.01)), []
    for _ in range(20):
        course.advance(1)
        rates.append(course.state_dict()["optimizer"]["param_groups"][0]["lr"])
    falling = [0.005 * (1 + math.cos(math.pi * i / 18)) for i in range(18)]
    assert rates == pytest.approx([0.005, 0.01, *falling])


def test_the_loss_is_the_weighted_sum_of_distillation_and_the_tasks_own() -> None:
    w = world("plain")
    lesson, student = replace(lesson_of(w), task_loss=w.task.loss), student_of(w)
    assert isinstance(lesson.material, Repeated)
    given = Portion(lesson.material.samples.batches[0], lesson.material.teacher[0], 1.0)
    whole, none, part = (_loss(student, lesson, given, Recipe(None, share)).item() for share in (1.0, 0.0, 0.2))
    assert whole != pytest.approx(none)
    assert part == pytest.approx(0.2 * whole + 0.8 * none)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_weights_of_8_bits_are_so_at_every_stop_however_often_it_stops(ema: float | None) -> None:
    w = world("projection", samples=256)
    lesson, found = lesson_of(w), []
    for parts in (6, 3, 1):
        student = student_of(w)
        first = next(m for m in student.modules() if isinstance(m, nn.Conv2d) and m.weight.shape[1] > 1)
        first.weight.data = nearest(first.weight.detach()).weight
        course = Course(student, lesson, 6, 0, recipe=Recipe(ema=ema))
        for _ in range(parts):
            course.advance(6 // parts)
            assert is_rounded(first.weight.detach())
        found.append({name: value.clone() for name, value in student.state_dict().items()})
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
        assert torch.equal(value, found[2][name]), name


def test_a_pattern_holds_the_weights_that_8_bits_hide() -> None:
    w = world("projection", samples=256)
    student = student_of(w)
    name, layer = next((n, m) for n, m in student.named_modules() if isinstance(m, nn.Conv2d) and m.weight.shape[1] > 1)
    layer.weight.data[:, ::2] = 0.0
    layer.weight.data = nearest(layer.weight.detach()).weight
    course = Course(student, replace(lesson_of(w), patterned=frozenset({f"{name}.weight"})), 4, 0)
    course.advance(4)
    exact = course.state_dict()["exact"][0][0]
    assert not bool(exact[:, ::2].any())
    assert bool(exact[:, 1::2].any())
