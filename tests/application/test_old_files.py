"""Policy files of earlier versions apply for ever, whatever the analysis finds by now."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import autoprune
from autoprune.errors import InputError
from autoprune.evaluator.settings import Settings
from autoprune.files.policy_file import load_front
from autoprune.front import Point
from autoprune.tasks.digits import Digits
from autoprune.tracing.fingerprint import weights_fingerprint
from autoprune.tracing.slim import named_tensors
from tests.golden_models import RandomPictures

GOLDENS = Path(__file__).parents[1] / "goldens" / "0.1.0"


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _sliced(point: Point, task: RandomPictures) -> nn.Module:
    with pytest.warns(UserWarning, match="only slices"):
        return autoprune.apply(point, task.build(), task.example_inputs())


@pytest.mark.parametrize("name", ["mixed", "resnet20"])
def test_a_file_of_0_1_0_replays_its_atoms_on_the_weights_that_it_names(name: str) -> None:
    front, task = load_front(GOLDENS / f"{name}.json"), RandomPictures(name)
    dense = task.build()
    assert weights_fingerprint(dense) == front.base.weights_fingerprint
    for point in (front[0], front[len(front) // 2]):
        small = _sliced(point, task)
        assert _parameters(small) == point.costs["params"]
        assert _kept_vectors(point, dense, small) > 0


def _kept_vectors(point: Point, dense: nn.Module, small: nn.Module) -> int:
    """How many vectors (biases, statistics) were cut, each exactly to the atoms that the file keeps."""
    before, after, seen = named_tensors(dense), named_tensors(small), 0
    for group in point.base.groups:
        for part in group.slices:
            if before[part.tensor].dim() == 1:
                positions = [i for atom in point.keep[group.name] for i in part.positions(atom)]
                if len(after[part.tensor]) == len(positions):  # else several groups meet in it
                    assert torch.equal(after[part.tensor], before[part.tensor][positions])
                    seen += 1
    return seen


def test_a_file_of_0_1_0_is_repaired_and_scored_with_a_task() -> None:
    front, task = load_front(GOLDENS / "mixed.json"), RandomPictures("mixed")
    small = autoprune.apply(
        front[0], task.build(), task.example_inputs(), task=task, settings=Settings(calibration=32, validation=32)
    )
    assert _parameters(small) == front[0].costs["params"]


def test_the_digits_file_of_0_1_0_applies_to_the_weights_of_this_machine() -> None:
    front, task = load_front(GOLDENS / "digits.json"), Digits()
    point = front.select(macs=0.5)
    small = autoprune.apply(
        point, task.build(), task.example_inputs(), task=task, settings=Settings(calibration=160, validation=80)
    )
    assert _parameters(small) == point.costs["params"]


@pytest.fixture(scope="module")
def point() -> Point:
    return load_front(GOLDENS / "mixed.json")[0]


@pytest.fixture(scope="module")
def task() -> RandomPictures:
    return RandomPictures("mixed")


def test_another_fingerprint_alone_refuses_nothing(point: Point, task: RandomPictures) -> None:
    other = replace(point, base=replace(point.base, structure_fingerprint="sha256:of another analysis"))
    assert _parameters(_sliced(other, task)) == point.costs["params"]


def test_a_group_that_the_file_does_not_know_stays_dense(point: Point, task: RandomPictures) -> None:
    gone, *rest = point.base.groups
    known = {g.name for g in rest}
    fewer = replace(
        point,
        base=replace(point.base, groups=tuple(rest)),
        policy=autoprune.Policy.of({n: w for n, w in point.policy.widths if n in known}),
        keep={n: k for n, k in point.keep.items() if n in known},
    )
    small = named_tensors(_sliced(fewer, task))
    assert small[gone.slices[0].tensor].shape[0] == gone.width
    assert small[rest[0].slices[0].tensor].shape[0] == point.policy.as_dict()[rest[0].name]


def test_slices_that_are_not_those_of_the_group_fail_the_experiment(point: Point, task: RandomPictures) -> None:
    concat = next(i for i, g in enumerate(point.base.groups) if g.name == "right")
    group = point.base.groups[concat]
    moved = tuple(replace(s, offset=0) if s.offset else s for s in group.slices)  # as if `right` stood first
    groups = [*point.base.groups]
    groups[concat] = replace(group, slices=moved)
    damaged = replace(point, base=replace(point.base, groups=tuple(groups)))
    with pytest.raises(InputError, match=r"right: .*(not the same as masking|does not run)"):
        autoprune.apply(damaged, task.build(), task.example_inputs())
    missing = replace(group, slices=group.slices[:-1])
    groups[concat] = missing
    damaged = replace(point, base=replace(point.base, groups=tuple(groups)))
    with pytest.raises(InputError, match="right: the model does not run once its channels are removed"):
        autoprune.apply(damaged, task.build(), task.example_inputs())


def _changed(task: RandomPictures, name: str, layer: nn.Module) -> nn.Module:
    model = task.build()
    setattr(model, name, layer)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("stem", nn.Conv2d(1, 10, 3, padding=1), "stem: policy says 12 wide, model has 10"),
        ("hidden", nn.Linear(256, 24), "hidden: policy says 20 wide, model has 24"),
        ("head", nn.Linear(20, 7), "another number of classes"),
        ("stem", nn.Identity(), "stem: the model has no such group"),
    ],
)
def test_another_structure_is_refused_with_the_layer_named(
    name: str, layer: nn.Module, message: str, point: Point, task: RandomPictures
) -> None:
    with pytest.raises(InputError, match=message):
        autoprune.apply(point, _changed(task, name, layer), task.example_inputs())


def test_recorded_shapes_name_the_layer_that_is_no_group(point: Point, task: RandomPictures) -> None:
    shapes = {name: tuple(t.shape) for name, t in named_tensors(task.build()).items()}
    recorded = replace(point, base=replace(point.base, shapes=shapes))
    assert _parameters(_sliced(recorded, task)) == point.costs["params"]
    with pytest.raises(InputError, match=r"head.weight: policy says \[5, 20\], model has \[7, 20\]"):
        autoprune.apply(recorded, _changed(task, "head", nn.Linear(20, 7)), task.example_inputs())


def test_a_second_apply_is_refused(point: Point, task: RandomPictures) -> None:
    with pytest.raises(InputError, match="was applied to this model before"):
        autoprune.apply(point, _sliced(point, task), task.example_inputs())


def test_another_input_size_is_said_and_not_refused() -> None:
    front, task = load_front(GOLDENS / "resnet20.json"), RandomPictures("resnet20")
    with (
        pytest.warns(UserWarning, match="only slices"),
        pytest.warns(UserWarning, match=r"on inputs of \[\[3, 32"),
    ):
        small = autoprune.apply(front[0], task.build(), (torch.randn(2, 3, 16, 16),))
    assert _parameters(small) == front[0].costs["params"]
