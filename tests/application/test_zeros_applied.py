"""Points of a search over weights: applied they hold the zeros that the front promises, by data, by size, elsewhere."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autoprune
from autoprune.application.apply import applying
from autoprune.application.repair import Manner, searched_settings
from autoprune.application.training import Training
from autoprune.application.transfer import transfer
from autoprune.criteria import build_criterion
from autoprune.errors import InputError
from autoprune.evaluator.settings import Settings
from autoprune.files.job import Job
from autoprune.files.policy_file import load_front
from autoprune.front import COUNTS, Front, Point
from autoprune.protocols import finished
from autoprune.run.run import search
from autoprune.tasks.digits import Digits
from autoprune.tracing.masks import digest
from tests.conftest import SMALL
from tests.siblings import DeepDigits

EVALUATOR = {name: int(value) for name, value in (part.split("=") for part in SMALL)}


def job(criterion: str, granularity: Any, costs: str = "nonzeros", **evaluator: Any) -> Job:
    return Job.from_dict(
        {
            "task": {"name": "digits"},
            "space": {"granularity": granularity, "multiple_of": 1},
            "criterion": criterion,
            "objectives": {"costs": [costs]},
            "budget": {costs: [0.3, 0.8], "at": [0.5]},
            "search": {"trials": 4, "sampler": "random"},
            "evaluator": {**EVALUATOR, "fitness": "stitch", "sensitivity": 0, **evaluator},
            "executor": {"kind": "inline"},
        }
    )


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Front:
    """Of `obs`, from its file."""
    run = search(job("obs", "weight"), out=tmp_path_factory.mktemp("obs"))
    found = load_front(run.finish().path / "policy.json")
    assert found.points == run.front.points
    counts = [p.costs[name] for p in found for name in COUNTS]
    assert all(isinstance(count, int) for count in [*counts, *found.base.costs.values()])
    return found


@pytest.fixture(scope="module")
def by_size(tmp_path_factory: pytest.TempPathFactory) -> Front:
    """Of magnitudes, channels first, then what is left of the weights."""
    return search(job("l1_norm", ["channel", "weight"], "bytes", finalists=0), out=tmp_path_factory.mktemp("l1")).front


def sparse(point: Point) -> dict[str, int]:
    """The widths of the weights that the point gives zeros."""
    return {
        g.name: w for g in point.base.groups if g.kind == "weight" and (w := point.policy.as_dict()[g.name]) < g.width
    }


def applied(point: Point, task: Digits, **training: Any) -> dict[str, Any]:
    manner = Manner(searched_settings(point, Settings()), build_criterion("obs"), Training(**training))
    found = finished(applying(point, task.build(), task.example_inputs(), task, manner))
    return {**found.facts, "model": found.model, "kept": found.kept}


@pytest.mark.parametrize("finetune", ["none", "proxy"])
def test_the_masks_of_the_front_are_made_again_and_the_figures_are_its_own(
    front: Front, digits: Digits, finetune: str
) -> None:
    point = next(p for p in front if p.finetuned) if finetune == "proxy" else front[0]
    found = applied(point, digits, kind=finetune)
    assert found["atoms"] == "replayed"
    assert found["validation"]["loss"]["loss"] == pytest.approx(found["promised"]["loss"]["loss"], rel=1e-3, abs=1e-6)
    for name, width in sparse(point).items():
        tensor = found["model"].get_parameter(name)
        assert int((tensor != 0).sum()) == width
        assert digest(tensor != 0) == point.masks[name]
    assert found["kept"].masks == point.masks


def test_a_mask_that_comes_out_otherwise_is_told(front: Front, digits: Digits) -> None:
    name = next(iter(sparse(front[0])))
    other = replace(front[0], masks={**front[0].masks, name: f"sha256:{'0' * 64}"})
    assert applied(other, digits, kind="none")["atoms"] == "replayed, but for the zeros of 1 weights (made anew here)"


def test_other_weights_get_masks_of_their_own(front: Front, digits: Digits) -> None:
    model = digits.build()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.3 * torch.rand(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    small = autoprune.apply(front[0], model, digits.example_inputs(), task=digits, finetune="none")
    counts = {name: int((small.get_parameter(name) != 0).sum()) for name in sparse(front[0])}
    assert counts == sparse(front[0])


def test_without_data_zeros_go_by_size_and_by_nothing_else(front: Front, by_size: Front, digits: Digits) -> None:
    point = next(p for p in by_size if sparse(p))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = autoprune.apply(point, digits.build(), digits.example_inputs())
        for name, width in sparse(point).items():
            tensor, dense = small.get_parameter(name), point.base.shapes[name]
            share = width / torch.Size(dense).numel()
            assert abs(int((tensor != 0).sum()) - share * tensor.numel()) <= 0.5
            assert digest(tensor != 0) == point.masks[name]
        with pytest.raises(InputError, match="give a task, or a criterion that looks at weights alone") as caught:
            autoprune.apply(front[0], digits.build(), digits.example_inputs())
    assert "\n" not in str(caught.value)


def test_an_applied_folder_gives_the_zeros_back(front: Front, digits: Digits, tmp_path: Path) -> None:
    small = autoprune.apply(front[0], digits.build(), digits.example_inputs(), task=digits, finetune="none")
    autoprune.save(small, tmp_path)
    costs = json.loads((tmp_path / "apply.json").read_text())["costs"]
    assert costs["nonzeros"] == {"dense": front.base.costs["nonzeros"], "pruned": front[0].costs["nonzeros"]}
    assert costs["effective_macs"]["pruned"] < costs["macs"]["pruned"] == costs["macs"]["dense"]
    assert f"pruned to {front[0].ratio('nonzeros'):.1%} of its prunable weights" in (tmp_path / "README.md").read_text()
    again = autoprune.load(tmp_path)
    assert isinstance(again, nn.Module)
    for (name, a), b in zip(small.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_densities_go_over_to_a_deeper_sibling(front: Front) -> None:
    deep = DeepDigits()
    moved = transfer(front[0], deep.build().eval(), deep.example_inputs(), cost="nonzeros")
    assert moved.ratio("nonzeros") <= front[0].ratio("nonzeros") + 1e-9
    assert not moved.masks
    small = autoprune.apply(moved, deep.build().eval(), deep.example_inputs(), task=deep, finetune="none")
    for name, width in sparse(moved).items():
        assert int((small.get_parameter(name) != 0).sum()) == width
