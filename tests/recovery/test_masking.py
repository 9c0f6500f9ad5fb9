"""Masks that move, step by step and by hand: the cubic, the exchange, the rounds, patterns and targets."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autoprune.errors import InputError
from autoprune.matrices import with_weights
from autoprune.policy import Policy
from autoprune.recovery import build_recovery
from autoprune.recovery._distilled import Distilled, Masked
from autoprune.recovery._masking import MaskedCourse, Target, largest, targets_of
from autoprune.recovery.iterative import Iterative
from autoprune.recovery.rigl import exchanged
from autoprune.recovery.sparse_first import STRENGTHS, SparseFirst
from autoprune.tracing.rounding import is_rounded, nearest
from tests.small import World, nonzeros, student_of, thin, world, world_of

DENSITY = 0.2


@pytest.fixture(scope="module")
def w() -> World:
    return world("projection", samples=256)


def course_of(name: str, w: World, student: nn.Module, steps: int, **options: object) -> MaskedCourse:
    made = build_recovery(name, {"learning_rate": 0.01, **options}).begun(student, w.model, w.task, steps, 0)
    assert isinstance(made, MaskedCourse)
    return made


def test_the_largest_of_some_are_found_and_of_equals_the_first() -> None:
    scores = torch.tensor([[3.0, 1.0, 3.0], [0.0, 2.0, 3.0]])
    assert largest(scores, 2).tolist() == [[True, False, True], [False, False, False]]
    among = torch.tensor([[False, True, True], [True, False, False]])
    assert largest(scores, 2, among).tolist() == [[False, True, True], [False, False, False]]
    assert torch.equal(largest(scores, 6, among), among)


def test_an_exchange_gives_the_smallest_for_the_largest_gradients() -> None:
    weight = torch.tensor([4.0, -1.0, 3.0, 0.5, 0.0, 0.0, 0.0, 0.0])
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).bool()
    gradient = torch.tensor([9.0, 0.1, 9.0, 0.1, 0.2, 0.3, -0.4, 0.0])
    assert exchanged(weight, gradient, mask, 0.5).nonzero().flatten().tolist() == [0, 2, 5, 6]
    back = gradient.clone()
    back[1] = 5.0
    assert exchanged(weight, back, mask, 0.5).nonzero().flatten().tolist() == [0, 1, 2, 6], "the paper has them return"
    still = torch.tensor([9.0, 0.1, 9.0, 0.1, 0.0, 0.3, 0.0, 0.0])
    assert exchanged(weight, still, mask, 0.5).nonzero().flatten().tolist() == [0, 1, 2, 5], "where nothing flows: none"
    assert torch.equal(exchanged(weight, gradient, mask, 0.1), mask)


def test_zeros_spread_by_the_cubic_and_end_at_the_density_of_each_matrix(w: World) -> None:
    student = thin(student_of(w), DENSITY)
    given, numbers = nonzeros(student), {n: p.numel() for n, p in w.model.named_parameters() if p.dim() > 1}
    training = course_of("gradual", w, student, 20, every=3, until=0.5)
    last, seen = 9, dict[int, dict[str, int]]()
    for progress in training:
        seen[progress.step] = nonzeros(student)
        assert training.ready == (progress.step > last)
    for name, n in numbers.items():
        for step in (3, 6, 9):
            expected = given[name] + round((1.0 - step / last) ** 3 * (n - given[name]))
            assert seen[step + 1][name] == expected, (name, step)
        assert seen[1][name] == n, "it starts with all weights"
        assert [seen[s][name] for s in (2, 3)] == [n, n], "between two of them nothing goes"
        assert {seen[s][name] for s in range(10, 21)} == {given[name]}


def test_a_cubic_of_one_step_cuts_at_once(w: World) -> None:
    student = thin(student_of(w), DENSITY)
    given = nonzeros(student)
    assert [p.step for p in course_of("gradual", w, student, 1)] == [1]
    assert nonzeros(student) == given


@pytest.mark.parametrize("more", [{}, {"ema": 0.9, "weight_decay": 0.1}])
def test_an_exchange_leaves_the_density_at_every_step_and_stops_at_three_quarters(
    w: World, more: dict[str, float]
) -> None:
    student, steps, every = thin(student_of(w), DENSITY), 16, 2
    given, moved = nonzeros(student), dict[int, int]()
    before = {n: student.get_parameter(n) != 0 for n in given}
    for progress in course_of("rigl", w, student, steps, every=every, **more):
        assert nonzeros(student) == given, progress.step
        now = {n: student.get_parameter(n) != 0 for n in given}
        moved[progress.step - 1] = sum(int((now[n] & ~before[n]).sum()) for n in given)
        before = now
    assert [s for s, n in moved.items() if n] == [2, 4, 6, 8, 10], "steps before 12, which share of them a cosine says"
    assert all(
        moved[s] <= sum(int(0.15 * (1 + math.cos(math.pi * s / 12)) * n) for n in given.values())
        for s in moved
        if s < 12
    )
    assert moved[2] > moved[10]


def test_zeros_of_the_dense_model_stay_where_they_are_in_an_exchange(w: World) -> None:
    name = max(nonzeros(w.model), key=lambda n: w.model.get_parameter(n).numel())
    brought = copy.deepcopy(w.model)
    with torch.no_grad():
        brought.get_parameter(name)[:, ::2, 0] = 0.0
    own = world_of(brought, (3, 8, 8), 256)
    student = thin(student_of(own), DENSITY)
    before = {n: student.get_parameter(n) != 0 for n in nonzeros(student)}
    list(course_of("rigl", own, student, 8, every=2))
    still = {n for n, mask in before.items() if torch.equal(mask, student.get_parameter(n) != 0)}
    assert still == {name}


def test_rounds_keep_equal_shares_and_each_goes_back(w: World, tmp_path: Path) -> None:
    early = {k: (v + 0.1 if v.is_floating_point() else v).contiguous() for k, v in w.model.state_dict().items()}
    save_file(early, tmp_path / "early.safetensors")
    student = thin(student_of(w), DENSITY)
    given = nonzeros(student)
    options = {"weights": tmp_path / "early.safetensors", "rounds": 2, "learning_rate": 1e-9, "weight_decay": 0.0}
    made = build_recovery("lottery", options).begun(student, w.model, w.task, 9, 0)
    seen = []
    for progress in made:
        seen.append((progress.step, progress.samples, nonzeros(student)))
        for name in given:
            weight = student.get_parameter(name).detach()
            torch.testing.assert_close(weight, early[name] * (weight != 0), rtol=1e-4, atol=1e-5)
    assert [(step, samples) for step, samples, _ in seen] == [(n, 128 * n) for n in range(1, 10)]
    for name, target in given.items():
        n = early[name].numel()
        assert [found[name] for _, _, found in seen[::3]] == [n, round(n * (target / n) ** 0.5), target]
        kept = largest(early[name].abs(), target)
        assert torch.equal(student.get_parameter(name) != 0, kept), "at no rate the early weights themselves say which"


def two_of_four(weight: Tensor, dim: int) -> Tensor:
    blocks = weight.movedim(dim, -1).unflatten(-1, (-1, 4))
    small = blocks.abs().argsort(-1)[..., :2]
    return blocks.scatter(-1, small, 0.0).flatten(-2).movedim(-1, dim)


@pytest.mark.parametrize("name", ["gradual", "lottery"])
def test_a_pattern_of_the_point_is_kept(w: World, name: str, tmp_path: Path) -> None:
    student, given = student_of(w), dict[str, int]()
    with torch.no_grad():
        for key, p in student.named_parameters():
            if p.dim() > 1 and p.shape[1] % 4 == 0:
                p.copy_(two_of_four(p.detach(), 1))
                given[key] = p.numel() // 2
    point = {n: Masked(student.get_parameter(n) != 0, "2:4") for n in given}
    targets = targets_of(student, w.model, Distilled(point=point))
    assert set(targets) == set(given)
    assert all(target == Target(given[n], 2, 4, 1) for n, target in targets.items())
    save_file({k: v.contiguous() for k, v in w.model.state_dict().items()}, tmp_path / "early.safetensors")
    own = {"weights": tmp_path / "early.safetensors"} if name == "lottery" else {"every": 1}
    recovery = build_recovery(name, {"learning_rate": 0.01, **own})
    recovery.at_point({n: masked.mask for n, masked in point.items()}, dict.fromkeys(point, "2:4"))
    made = recovery.begun(student, w.model, w.task, 8, 0)
    dense = 0
    for _ in made:
        counts = {key: (student.get_parameter(key) != 0).unflatten(1, (-1, 4)).sum(2) for key in given}
        assert all(int(c.min()) >= 2 for c in counts.values()), "no block loses more than it must"
        dense += any(int(c.max()) > 2 for c in counts.values())
    assert 0 < dense < 8
    assert all(bool((c == 2).all()) for c in counts.values())


def test_a_pattern_is_the_points_and_sideways_weights_count_their_inputs() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ConvTranspose2d(16, 6, 3), nn.Linear(3, 3))
    dense = copy.deepcopy(model)
    thin(model[0], 0.3)
    with torch.no_grad():
        model[1].weight.copy_(two_of_four(model[1].weight.detach(), 0))
    alive = {n: model.get_parameter(n) != 0 for n in ("0.weight", "1.weight")}
    guessed = targets_of(model, dense, Distilled())
    assert guessed == {n: Target(int(mask.sum()), dim=int(n == "0.weight")) for n, mask in alive.items()}
    assert targets_of(model, dense, Distilled(point={})) == {}
    point = {"0.weight": Masked(alive["0.weight"]), "1.weight": Masked(alive["1.weight"], "2:4")}
    found = targets_of(model, dense, Distilled(point={**point, "absent": point["0.weight"]}))
    assert found == {"0.weight": Target(round(0.3 * 64 * 64)), "1.weight": Target(16 * 6 * 9 // 2, 2, 4, 0)}
    for target, weight in ((found["0.weight"], dense[0].weight), (found["1.weight"], dense[1].weight)):
        assert int(target.mask(weight, target.kept).sum()) == target.kept
    assert torch.equal(found["1.weight"].mask(dense[1].weight, 16 * 6 * 9 // 2), model[1].weight != 0)


@pytest.mark.parametrize("name", ["gradual", "rigl", "lottery"])
def test_weights_of_8_bits_are_so_at_every_step_and_have_no_more_than_they_shall(
    w: World, name: str, tmp_path: Path
) -> None:
    own = copy.deepcopy(w.model)
    for p in own.parameters():
        if p.dim() > 1:
            p.data = nearest(p.detach()).weight
    save_file({k: v.contiguous() for k, v in own.state_dict().items()}, tmp_path / "early.safetensors")
    options = {"gradual": {"every": 1}, "rigl": {"every": 1}, "lottery": {"weights": tmp_path / "early.safetensors"}}
    student = thin(copy.deepcopy(own), 0.5)
    for p in student.parameters():
        if p.dim() > 1:
            p.data = nearest(p.detach()).weight
    given = nonzeros(student)
    made = build_recovery(name, {"learning_rate": 0.01, "ema": 0.9, **options[name]})
    for _ in made.begun(student, w.model, w.task, 8, 0, copy.deepcopy(own)):
        assert all(is_rounded(student.get_parameter(n)) for n in given)
    least = 0.5 if name == "rigl" else 0.8  # weights that just began are rounded to zero
    assert all(least * given[n] < found <= given[n] for n, found in nonzeros(student).items())


def test_a_pattern_is_nothing_for_an_exchange(w: World) -> None:
    structure = with_weights(w.structure, "2:4")
    policy = Policy.of({g.name: g.grid[0] if g.kind == "weight" else g.width for g in structure})
    with pytest.raises(InputError, match=r"rigl moves zeros wherever .* keeps 2:4; take gradual, lottery or one_shot"):
        build_recovery("rigl", {}).check_policy(structure, policy)
    build_recovery("gradual", {}).check_policy(structure, policy)


def test_rounds_of_cutting_take_weights_by_and_by_and_a_pattern_at_once(w: World) -> None:
    for pattern, steps in (("", 3), ("2:4", 1)):
        structure = with_weights(w.structure, pattern)
        policy = Policy.of({g.name: g.grid[0] if g.kind == "weight" else g.width for g in structure})
        path = [p.as_dict() for p in Iterative(rounds=3).path(structure, policy)]
        assert len(path) == steps
        for group in (g for g in structure if g.kind == "weight"):
            row = [p[group.name] for p in path]
            left = [math.ceil(group.grid[0] + (1 - r / 3) ** 3 * (group.width - group.grid[0])) for r in (1, 2, 3)]
            assert row == (left if not pattern else [group.grid[0]])
            assert all(a > b for a, b in itertools.pairwise([group.width, *row]))


def test_an_l1_pulls_the_weights_of_matrices_to_zero_one_by_one(w: World) -> None:
    structure = with_weights(w.structure)
    model, name = copy.deepcopy(w.model), max(nonzeros(w.model), key=lambda n: w.model.get_parameter(n).numel())
    made = SparseFirst(penalty="l1", strength=0.2, course=Distilled(learning_rate=0.02, ema=0.9))
    list(made.before(model, w.model, structure.groups, w.task, 20, 0))
    left = nonzeros(model)
    assert all(0 < left[n] < 0.95 * p.numel() for n, p in w.model.named_parameters() if p.dim() > 1)
    gone = model.get_parameter(name) == 0
    was = w.model.get_parameter(name).detach().abs()
    assert float(was[gone].mean()) < 0.5 * float(was[~gone].mean()), "small ones go first"
    for penalty, groups, said in (
        ("l1", w.structure.groups, "penalty l1 needs weights whose zeros are searched"),
        (
            "group_lasso",
            [g for g in structure if g.kind == "weight"],
            "group_lasso needs groups whose atoms are removed",
        ),
    ):
        with pytest.raises(InputError, match=said):
            SparseFirst(penalty=penalty).before(copy.deepcopy(w.model), w.model, groups, w.task, 4, 0)


def test_without_a_penalty_atoms_are_pulled_where_there_are_any_else_weights(w: World) -> None:
    structure = with_weights(w.structure)
    for penalty, groups in (
        ("group_lasso", structure.groups),
        ("l1", [g for g in structure if g.kind == "weight"]),
    ):
        usual, named = copy.deepcopy(w.model), copy.deepcopy(w.model)
        for model, options in ((usual, {}), (named, {"penalty": penalty, "strength": STRENGTHS[penalty]})):
            made = SparseFirst(**options, course=Distilled(learning_rate=0.02))
            list(made.before(model, w.model, groups, w.task, 3, 0))
        assert all(torch.equal(a, b) for a, b in zip(usual.parameters(), named.parameters(), strict=True))


@pytest.mark.parametrize("name", ["lottery", "rewind"])
def test_a_recovery_that_lacks_an_option_says_where_it_goes(name: str) -> None:
    with pytest.raises(InputError, match=r"needs weights, .*; in the job file: recovery: \{options: \{\.\.\.\}\}$"):
        build_recovery(name, {})


def test_a_mask_of_the_point_is_held_where_the_zeros_of_the_weight_show_none() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = world_of(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), (6,), 256)
    with torch.no_grad():
        own.model[2].weight.zero_()
    mask = torch.arange(48).view(3, 16) % 3 == 0
    for masks, left in (({"2.weight": mask}, 16), ({}, 48)):
        student = copy.deepcopy(own.model)
        made = build_recovery("one_shot", {"learning_rate": 0.1, "distillation": 0.0})
        made.at_point(masks, {})
        list(made.begun(student, own.model, own.task, 4, 0))
        assert int((student[2].weight != 0).sum()) == left


def test_zeros_of_a_pattern_that_the_dense_model_brings_stay_under_a_mask() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = world_of(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), (6,), 256)
    with torch.no_grad():
        own.model[0].weight[::2, ::2] = 0.0
        own.model[0].weight[1::2, 1::2] = 0.0
    course = Distilled(point={"0.weight": Masked(torch.arange(96).view(16, 6) < 90)})
    expected = (own.model[0].weight != 0) & (torch.arange(96).view(16, 6) < 90)
    assert torch.equal(course.masks_for(own.model, own.model)["0.weight"], expected)


@pytest.mark.parametrize("outputs", [2, 10])
@pytest.mark.parametrize("density", [0.3, 0.85])
@pytest.mark.parametrize("name", ["gradual", "lottery"])
def test_a_mask_by_chance_is_no_pattern_and_as_many_weights_train(
    name: str, density: float, outputs: int, tmp_path: Path
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = world_of(nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, outputs)), (6,), 256)
    student = thin(copy.deepcopy(own.model), density)
    given, mask = nonzeros(student), student[2].weight.detach() != 0
    save_file({k: v.contiguous() for k, v in own.model.state_dict().items()}, tmp_path / "early.safetensors")
    options = {"weights": tmp_path / "early.safetensors"} if name == "lottery" else {"every": 2}
    made = build_recovery(name, {"learning_rate": 0.01, **options})
    made.at_point({n: student.get_parameter(n).detach() != 0 for n in given}, {})
    assert targets_of(student, own.model, made.course)["2.weight"] == Target(int(mask.sum()))
    list(made.begun(student, own.model, own.task, 8, 0))
    assert nonzeros(student) == given
