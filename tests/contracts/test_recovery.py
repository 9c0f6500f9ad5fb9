"""The contract of every recovery: it trains in place, to the last step, by its seed alone, and leaves chance alone.

One that trains by a `course` also keeps the zeros that a model brings; one with a state goes on from it to the bit.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autoprune import plugins
from autoprune.errors import InputError
from autoprune.matrices import with_weights
from autoprune.policy import Policy
from autoprune.protocols import PathRecovery, Progress, Resumable, SparseRecovery, ThinningRecovery
from autoprune.recovery import Watched, build_recovery
from tests.small import World, nonzeros, student_of, thin, world, world_of

STEPS = 4
NAMES = plugins.names("recovery")
OPTIONS: dict[str, dict[str, Any]] = {"rewind": {"weights": __file__}, "gradual": {"every": 1}, "rigl": {"every": 1}}
"""What a recovery cannot do without, a file that is there will do here; masks change often."""
MORE = {name: {"ema": 0.9, "fresh": True} for name in ("one_shot", "iterative", "gradual", "rigl", "lottery")}
"""So that there is more than the weights to go on with."""


@pytest.fixture(autouse=True)
def _early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery that goes back as it is called, and not by its caller, needs a checkpoint of the model itself."""
    monkeypatch.setitem(OPTIONS, "lottery", {"weights": tmp_path / "early.safetensors"})


def built(w: World, name: str, more: dict[str, Any] | None = None) -> Watched:
    options = {**OPTIONS.get(name, {}), **(more or {})}
    if name == "lottery":
        early = {k: (0.9 * v if v.is_floating_point() else v).contiguous() for k, v in w.model.state_dict().items()}
        save_file(early, options["weights"])
    return build_recovery(name, options)


def given(w: World, name: str) -> nn.Module:
    """What it trains: where it moves zeros, half of the weights of each matrix are zero."""
    student = student_of(w)
    if hasattr(built(w, name).recovery, "check_policy"):
        thin(student, 0.5)
    return student


def trained(w: World, name: str, seed: int = 0) -> tuple[nn.Module, list[Progress]]:
    student, seen = given(w, name), list[Progress]()
    for progress in built(w, name)(student, w.model, w.task, STEPS, seed):
        assert not any(m.training for m in student.modules()), "it cannot be scored as it stands"
        seen.append(progress)
    return student, seen


def dropping() -> World:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
    return world_of(model.eval(), (6,), 256)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_in_place_for_the_steps_that_it_was_given_and_all_is_finite(name: str) -> None:
    w = world("projection", samples=256)
    dense = copy.deepcopy(w.model.state_dict())
    start = given(w, name).state_dict()
    student, seen = trained(w, name)
    steps = [p.step for p in seen]
    assert steps == sorted(set(steps))
    assert (steps[0] >= 1, steps[-1]) == (True, STEPS)
    assert seen[-1].samples > 0
    assert all(math.isfinite(p.loss) for p in seen)
    assert any(not torch.equal(p, start[n]) for n, p in student.named_parameters())
    assert all(bool(torch.isfinite(t).all()) for t in student.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(dense.values(), w.model.state_dict().values(), strict=True))
    assert not w.model.training


@pytest.mark.parametrize("name", NAMES)
def test_what_is_drawn_follows_from_the_seed_and_global_chance_is_left_alone(name: str) -> None:
    w = dropping()
    chance, threads = torch.get_rng_state(), torch.get_num_threads()
    first, _ = trained(w, name)
    assert torch.equal(chance, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    torch.rand(7)
    again, _ = trained(w, name)
    other, _ = trained(w, name, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def two_of_four(w: World) -> World:
    """The same with two zeros in every four weights of its matrices, in other places from row to row."""
    model = copy.deepcopy(w.model)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                rows, columns = (torch.arange(n) for n in p.shape)
                p[(rows[:, None] + columns) % 2 == 0] = 0.0
    return world_of(model, (6,), 256)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_that_a_model_brings_stay(name: str) -> None:
    if built(dropping(), name).course is None:
        pytest.skip("it trains by a course of its own")
    w = two_of_four(dropping())
    student, _ = trained(w, name)
    for key, value in given(w, name).named_parameters():
        after = dict(student.named_parameters())[key]
        if value.dim() > 1:
            assert bool((after[value == 0] == 0).all()), key
        assert not torch.equal(after, value)


def begun(w: World, name: str, student: nn.Module) -> Any:
    return built(w, name, MORE.get(name)).begun(student, w.model, w.task, STEPS, 0)


@pytest.mark.parametrize("name", NAMES)
def test_one_with_a_state_goes_on_from_it_to_the_very_same_weights(name: str) -> None:
    w = dropping()
    whole, student = given(w, name), given(w, name)
    for _ in begun(w, name, whole):
        pass
    first = begun(w, name, student)
    if not isinstance(first, Resumable):
        pytest.skip("it has no state: killed, it begins anew")
    for progress in first:
        if progress.step == 2:
            break
    file, other = io.BytesIO(), copy.deepcopy(student)
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = begun(w, name, other)
    second.load_state_dict(torch.load(file, weights_only=True))
    torch.rand(7)
    assert [p.step for p in second] == [3, 4]
    for key, value in whole.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_one_that_finds_masks_of_its_own_ends_with_as_many_weights_as_it_was_given(name: str) -> None:
    w = world("projection", samples=256)
    if not isinstance(built(w, name).recovery, ThinningRecovery):
        pytest.skip("the masks that it is given stay")
    student, whole = thin(student_of(w), 0.3), copy.deepcopy(w.model)
    given = nonzeros(student)
    made, ready = built(w, name).begun(student, w.model, w.task, STEPS, 0, whole), list[bool]()
    for _ in made:
        ready.append(made.ready)  # type: ignore[attr-defined]
        assert (nonzeros(student) == given) == ready[-1]
    assert ready == sorted(ready)
    assert (ready[0], ready[-1]) == (False, True)
    assert all(torch.equal(v, w.model.state_dict()[k]) for k, v in whole.state_dict().items()), "lent"


@pytest.mark.parametrize("name", NAMES)
def test_one_that_moves_zeros_refuses_a_point_that_has_none(name: str) -> None:
    w = world("projection", samples=256)
    made = built(w, name)
    if not hasattr(made.recovery, "check_policy"):
        pytest.skip("it takes any point")
    with pytest.raises(InputError, match=f"{name} moves the zeros of weights, and the point has none"):
        made.check_policy(w.structure, halved(w))
    with pytest.raises(InputError, match=f"{name} moves the zeros of weights, and the point has none"):
        list(made(student_of(w), w.model, w.task, STEPS, 0))
    structure = with_weights(w.structure)
    thinned = {g.name: g.grid[0] if g.kind == "weight" else g.width for g in structure}
    made.check_policy(structure, Policy.of(thinned))


def halved(w: World) -> Policy:
    return Policy.of({g.name: max(1, g.width // 2) for g in w.structure})


@pytest.mark.parametrize("name", NAMES)
def test_one_that_goes_by_a_path_narrows_step_by_step_to_the_policy(name: str) -> None:
    w = world("projection")
    made = built(w, name).recovery
    if not isinstance(made, PathRecovery):
        pytest.skip("it goes by no path")
    rows = [p.array(w.structure) for p in made.path(w.structure, halved(w))]
    assert len(rows) > 1
    assert all((a >= b).all() and (a > b).any() for a, b in itertools.pairwise(rows))
    assert (rows[-1] == halved(w).array(w.structure)).all()


@pytest.mark.parametrize("name", NAMES)
def test_one_that_trains_before_the_cut_trains_a_copy_and_leaves_the_teacher(name: str) -> None:
    w = world("projection", samples=256)
    made = built(w, name).recovery
    if not isinstance(made, SparseRecovery):
        pytest.skip("it trains nothing before the cut")
    dense, model = copy.deepcopy(w.model.state_dict()), copy.deepcopy(w.model)
    seen = list(made.before(model, w.model, w.structure.groups, w.task, STEPS, 0))
    assert seen[-1].step == STEPS
    assert 0.0 < made.share < 1.0
    assert any(not torch.equal(v, dense[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(dense.values(), w.model.state_dict().values(), strict=True))


def test_an_option_or_a_name_that_nobody_knows_is_one_line() -> None:
    with pytest.raises(InputError, match="unknown recovery 'one_shoot'; did you mean 'one_shot'"):
        build_recovery("one_shoot", {})
    with pytest.raises(InputError, match=r"recovery\.options: unknown option 'rate'"):
        build_recovery("one_shot", {"rate": 0.1})
    with pytest.raises(InputError, match=r"recovery\.options: distillation must lie in \[0, 1\], not 2"):
        build_recovery("one_shot", {"distillation": 2})
    with pytest.raises(InputError, match=r"rounds must be a whole number from 1 to 100, not 0"):
        build_recovery("iterative", {"rounds": 0})
    with pytest.raises(InputError, match="rewind needs weights, an early checkpoint"):
        build_recovery("rewind", {})
    with pytest.raises(InputError, match=r"unknown penalty 'lasso'; .*group_lasso"):
        build_recovery("sparse_first", {"penalty": "lasso"})
    with pytest.raises(InputError, match="lottery needs weights, an early checkpoint"):
        build_recovery("lottery", {})
    with pytest.raises(InputError, match="every must be a whole number from 1 on, not 0"):
        build_recovery("gradual", {"every": 0})
    with pytest.raises(InputError, match=r"until must be a share of the steps, above 0 and up to 1, not 1\.5"):
        build_recovery("rigl", {"until": 1.5})
    with pytest.raises(InputError, match="fraction must lie between 0 and 1, not 1"):
        build_recovery("rigl", {"fraction": 1})
    with pytest.raises(InputError, match="share must lie between 0 and 1, not 1"):
        build_recovery("sparse_first", {"share": 1.0})
