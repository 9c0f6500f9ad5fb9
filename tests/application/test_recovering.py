"""The full recovery: what each kind makes, never worse than given, and the same weights wherever it was stopped."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autoprune.application.bench import Bench
from autoprune.application.checkpoints import Place
from autoprune.application.recovering import Recovered, recovering
from autoprune.application.training import Training
from autoprune.criteria import build_criterion
from autoprune.errors import InputError, RunError
from autoprune.evaluation import Ask
from autoprune.evaluator.prepared import prepared_model, prepared_parts
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.policy import Policy
from autoprune.protocols import Progress, Step, finished
from autoprune.recovery._distilled import Distilled
from autoprune.recovery.iterative import Iterative
from autoprune.recovery.sparse_first import SparseFirst
from autoprune.tracing.copies import copied
from autoprune.tracing.slim import slim
from tests.small import World, world, world_of

EPOCHS = 6.0
STEPS = 12
"""256 samples are two steps an epoch."""
RATE = {"learning_rate": 0.01}


@pytest.fixture(scope="module")
def w() -> World:
    return world("projection", samples=256)


@pytest.fixture(scope="module")
def bench(w: World) -> Bench:
    return bench_of(w)


def bench_of(w: World) -> Bench:
    settings = Settings(calibration=128, validation=64, costs=(), precision="fp32")
    dense = prepared_model(w.task, settings.torch_device)
    parts = prepared_parts(w.task, settings, dense)
    return Bench(w.task, w.structure, settings, build_criterion("obs"), dense, parts, "refit")


def halved(w: World) -> Policy:
    return Policy.of({g.name: max(1, g.width // 2) for g in w.structure})


def kept(w: World) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(range(width)) for name, width in halved(w).widths}


def training(name: str, options: Mapping[str, Any]) -> Training:
    return Training("full", EPOCHS, name, options)


def started(bench: Bench, w: World, name: str, options: Mapping[str, Any], place: Place | None = None) -> Any:
    """The steps of a recovery of the atoms that `kept` names."""
    evaluator = finished(bench.evaluator(bench.dense, bench.structure, kept(w)))
    return recovering(evaluator, bench, halved(w), kept(w), training(name, options), place)


def recovered(bench: Bench, w: World, name: str, options: Mapping[str, Any], place: Place | None = None) -> Recovered:
    found: Recovered = finished(started(bench, w, name, options, place))
    return found


def fits(bench: Bench, found: Recovered) -> nn.Module:
    small = copied(bench.dense)
    slim(small, bench.structure, found.keep)
    small.load_state_dict(found.model.state_dict())
    return small


def test_one_shot_trains_what_was_cut_and_says_from_where_to_where(bench: Bench, w: World) -> None:
    before = copy.deepcopy(bench.dense.state_dict())
    found = recovered(bench, w, "one_shot", RATE)
    fits(bench, found)
    assert found.keep == kept(w)
    told = {"recipe": "full", "schedule": "one_shot", "steps": STEPS, "epochs": EPOCHS, "seed": 0}
    assert found.recipe == {**told, "learning_rate": 0.01, "helped": True}
    losses = dict(map(tuple, found.course["heldback"]))
    assert list(losses) == [0, 3, 6, 9, 12]
    assert losses[found.course["kept_step"]] == min(losses.values())
    assert set(found.course["before"]["metrics"]) == {"accuracy"}
    assert all(torch.equal(v, before[k]) for k, v in bench.dense.state_dict().items()), "the teacher is left alone"


def test_the_steps_count_what_is_trained_and_to_how_much(bench: Bench, w: World) -> None:
    steps = [s for s in started(bench, w, "iterative", {"rounds": 3, **RATE}) if s.unit == "steps"]
    assert [(s.stage, s.done, s.total) for s in steps] == [("training", n, STEPS) for n in range(1, STEPS + 1)]
    stages = [s.stage for s in started(bench, w, "one_shot", {})]
    assert stages[:2] == ["peak rate", "repair"]
    assert stages[2:4] == ["scores", "training"]


def test_rounds_share_the_steps_and_what_is_gone_stays_gone(
    bench: Bench, w: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_way, cut, repaired = list[Any](), Bench.cutter, list[Ask]()

    def watched(self: Bench, model: nn.Module, policy: Policy, keep: Any) -> Any:
        found = yield from cut(self, model, policy, keep)
        on_the_way.append(found[1])
        return found

    def asked(self: TieredEvaluator, ask: Ask) -> nn.Module:
        repaired.append(ask)
        return whole(self, ask)

    whole = TieredEvaluator.repaired
    monkeypatch.setattr(Bench, "cutter", watched)
    monkeypatch.setattr(TieredEvaluator, "repaired", asked)
    found = recovered(bench, w, "iterative", {"rounds": 3, **RATE})
    sets = [{name: set(atoms) for name, atoms in keep.items()} for keep in on_the_way]
    assert len(sets) == len(repaired) == 3, "each cut is repaired once, and nothing else is"
    assert all(after[name] <= earlier[name] for earlier, after in pairwise(sets) for name in after)
    fits(bench, found)
    assert recovered(bench, w, "iterative", {"rounds": 1, **RATE}).recipe["steps"] == STEPS


def early_of(bench: Bench, path: Path) -> Mapping[str, torch.Tensor]:
    early = {k: v + 0.25 if v.is_floating_point() else v for k, v in bench.dense.state_dict().items()}
    save_file({k: v.contiguous() for k, v in early.items()}, path)
    return early


def test_a_rewound_model_has_the_early_weights_of_the_atoms_that_are_kept(
    bench: Bench, w: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = early_of(bench, tmp_path / "early.safetensors")
    given: list[nn.Module] = []

    def watched(self: Any, model: nn.Module, *_: Any) -> Iterator[Progress]:
        given.append(copied(model))
        return iter(())

    monkeypatch.setattr("autoprune.recovery.rewind.Rewind.__call__", watched)
    with pytest.warns(UserWarning, match="did not make the model better"):
        found = recovered(bench, w, "rewind", {"weights": tmp_path / "early.safetensors", **RATE})
    expected = copied(bench.dense)
    expected.load_state_dict(early)
    slim(expected, bench.structure, kept(w))
    for model in (given[0], found.model):
        assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.state_dict().items())


@pytest.mark.parametrize("penalty", ["group_lasso", "bn_l1"])
def test_a_penalty_pulls_atoms_to_zero_before_the_cut(bench: Bench, w: World, penalty: str) -> None:
    fits(bench, recovered(bench, w, "sparse_first", {"penalty": penalty, "share": 0.25, **RATE}))
    model = copied(bench.dense)
    strong = SparseFirst(penalty=penalty, strength=100.0, course=Distilled(learning_rate=0.02, ema=0.9))
    list(strong.before(model, bench.dense, w.structure.groups, w.task, 20, 0))
    name = w.structure.groups[0].name
    shrunk, held = (m.state_dict() for m in (model, bench.dense))
    if penalty == "group_lasso":
        assert float(shrunk[f"{name}.weight"].norm()) < 0.1 * float(held[f"{name}.weight"].norm())
    else:
        scales = [s.tensor for s in w.structure.groups[0].slices if s.role == "carry" and s.tensor.endswith("weight")]
        assert all(float(shrunk[s].norm()) < 0.1 * float(held[s].norm()) for s in scales)


class Diverging(Iterative):
    def __call__(self, *_: Any) -> Iterator[Progress]:
        raise ArithmeticError("the loss is nan")
        yield


class DivergingSparse(SparseFirst):
    def before(self, *_: Any) -> Iterator[Progress]:
        raise ArithmeticError("the loss is nan")
        yield


@pytest.mark.filterwarnings("ignore:4 steps of training did not make")
def test_a_round_that_diverges_leaves_what_it_was_given_and_a_dense_one_that_does_is_one_line(
    bench: Bench, w: World
) -> None:
    with pytest.warns(UserWarning, match=r"training \d of 3 diverged .*set a lower recovery.options.learning_rate"):
        found = recovered(bench, w, f"{__name__}:Diverging", RATE)
    assert found.recipe["helped"] is False
    fits(bench, found)
    with pytest.raises(RunError, match=r"before the cut diverged .*set a lower recovery.options.learning_rate"):
        recovered(bench, w, f"{__name__}:DivergingSparse", RATE)


def test_a_training_that_makes_it_worse_gives_back_what_was_repaired(bench: Bench, w: World) -> None:
    with pytest.warns(UserWarning, match="12 steps of training did not make the model better, so it is as repaired"):
        found = recovered(bench, w, "one_shot", {"learning_rate": 10.0})
    evaluator = finished(bench.evaluator(bench.dense, bench.structure, kept(w)))
    plain = bench.settled(evaluator, halved(w), kept(w))
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in found.model.state_dict().items())


def test_a_training_that_gets_no_better_stops(bench: Bench, w: World) -> None:
    options = {"learning_rate": 10.0, "scorings": 12, "patience": 2}
    with pytest.warns(UserWarning, match="did not make the model better"):
        found = recovered(bench, w, "one_shot", options)
    assert [step for step, _ in found.course["heldback"]] == [0, 1, 2]


def test_the_average_of_the_weights_is_what_is_scored_and_kept(bench: Bench, w: World) -> None:
    plain, averaged = (recovered(bench, w, "one_shot", {**RATE, **more}) for more in ({}, {"ema": 0.9}))
    assert any(not torch.equal(v, plain.model.state_dict()[k]) for k, v in averaged.model.state_dict().items())
    evaluator = finished(bench.evaluator(bench.dense, bench.structure, kept(w)))
    scored = dict(map(tuple, averaged.course["heldback"]))[averaged.course["kept_step"]]
    assert evaluator.held_back(averaged.model) == pytest.approx(scored, rel=1e-6)


NAMES = ("one_shot", "iterative", "rewind", "sparse_first")
OWN: Mapping[str, Mapping[str, Any]] = {"iterative": {"rounds": 2}, "sparse_first": {"share": 0.4}}


@pytest.mark.filterwarnings("ignore:.*steps of training did not make the model better")
@pytest.mark.parametrize("name", NAMES)
def test_stopped_anywhere_and_gone_on_with_it_gives_the_very_same_weights(name: str, tmp_path: Path) -> None:
    w = dropping()
    bench = bench_of(w)
    early_of(bench, tmp_path / "early.safetensors")
    weights = {"weights": tmp_path / "early.safetensors"} if name == "rewind" else {}
    options = {**OWN.get(name, {}), **weights, **RATE, "ema": 0.9, "checkpoint_every": 1, "fresh": True}
    whole = recovered(bench, w, name, options)
    for stop in (1, 4, 7, 11, STEPS):
        place = Place(tmp_path / f"{stop}", "this one")
        for step in started(bench, w, name, options, place):
            if step.unit == "steps" and step.done == stop:
                break
        seen = list[Step]()
        steps = started(bench, w, name, options, place)
        again = finished(watched(steps, seen))
        done = [s.done for s in seen if s.unit == "steps"]
        assert done == list(range(stop + 1, STEPS + 1)), "what was done is not done again"
        assert again.recipe == whole.recipe
        assert again.course == whole.course
        for key, value in whole.model.state_dict().items():
            assert torch.equal(value, again.model.state_dict()[key]), (stop, key)


def watched(steps: Any, seen: list[Step]) -> Any:
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value
        seen.append(step)
        yield step


def dropping() -> World:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        model = nn.Sequential(*first, nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
    return world_of(model.eval(), (3, 4, 4), 256)


def test_a_finished_training_is_not_trained_again_and_another_works_state_is_nobodys(
    bench: Bench, w: World, tmp_path: Path
) -> None:
    place = Place(tmp_path / "kept", "one")
    whole = recovered(bench, w, "one_shot", {**RATE, "scorings": 2}, place)
    again = list(started(bench, w, "one_shot", {**RATE, "scorings": 2}, place))
    assert not [s for s in again if s.unit == "steps"]
    other = list(started(bench, w, "one_shot", {**RATE, "scorings": 2}, replace(place, key="two")))
    assert len([s for s in other if s.unit == "steps"]) == STEPS
    assert whole.recipe["helped"]


class Stateless(Iterative):
    """A user's recovery whose training is nothing but a generator."""

    def __call__(self, *given: Any) -> Iterator[Progress]:
        yield from super().__call__(*given)


def test_of_a_recovery_without_a_state_what_is_finished_is_kept(bench: Bench, w: World, tmp_path: Path) -> None:
    place, name, options = Place(tmp_path / "kept", "one"), f"{__name__}:Stateless", {"rounds": 2, **RATE}
    whole = recovered(bench, w, name, options)
    for step in started(bench, w, name, options, place):
        if step.unit == "steps" and step.done == 9:
            break
    seen = list[Step]()
    again = finished(watched(started(bench, w, name, options, place), seen))
    assert [s.done for s in seen if s.unit == "steps"] == list(range(7, STEPS + 1)), "from its second round on"
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in whole.model.state_dict().items())


def test_the_peak_rate_is_found_once_with_the_optimizer_that_trains_and_kept(
    bench: Bench, w: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = list[float](), list[float]()
    probe = Distilled.probe

    def noted(self: Distilled, model: nn.Module, lesson: Any, seed: int, rate: float, steps: int) -> None:
        assert self.optimizer == "adagrad"
        rates[0].append(rate)
        probe(self, model, lesson, seed, rate, steps)

    monkeypatch.setattr(Distilled, "probe", noted)
    place = Place(tmp_path / "kept", "one")
    found = recovered(bench, w, "one_shot", {"optimizer": "adagrad"}, place)
    assert rates[0][0] == 0.01, "that of the optimizer's own default"
    assert found.recipe["learning_rate"] in [pytest.approx(r, rel=1e-3) for r in rates[0]]
    asked = len(rates[0])
    recovered(bench, w, "one_shot", {"optimizer": "adagrad"}, place)
    assert len(rates[0]) == asked, "not looked for again"


def test_bn_l1_shrinks_scales_of_batch_norms_and_nothing_else() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8)),
            *(nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)),
        )
        slopes = nn.Sequential(nn.Linear(6, 8), nn.PReLU(8), nn.Linear(8, 3))
    w = world_of(net.eval(), (3, 4, 4), 64)
    course = Distilled(learning_rate=0.01)
    model, recovery = copy.deepcopy(w.model), SparseFirst(penalty="bn_l1", strength=50.0, course=course)
    list(recovery.before(model, w.model, w.structure.groups, w.task, 20, 0))
    shrunk, held = model.state_dict(), w.model.state_dict()
    assert float(shrunk["1.weight"].norm()) < 0.1 * float(held["1.weight"].norm())
    assert float(shrunk["3.weight"].norm()) > 0.5 * float(held["3.weight"].norm())
    other = world_of(slopes.eval(), (6,), 64)
    with pytest.raises(InputError, match="bn_l1 needs batch norms behind the groups"):
        recovery.before(copy.deepcopy(other.model), other.model, other.structure.groups, other.task, 4, 0)
