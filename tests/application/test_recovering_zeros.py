"""Recoveries of points with zeros in their weights: as many as the point has at the end, wherever it was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autoprune.application.bench import Bench, Kept
from autoprune.application.checkpoints import Place
from autoprune.application.recovering import Recovered, recovering
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.matrices import with_weights
from autoprune.policy import Policy
from autoprune.protocols import Progress, Step, finished
from autoprune.tracing.copies import copied
from autoprune.tracing.slim import slim
from tests.application.test_recovering import RATE, STEPS, bench_of, early_of, training, watched
from tests.small import World, nonzeros, world, world_of

NAMES = ("one_shot", "rewind", "gradual", "rigl", "lottery")
OWN: Mapping[str, Mapping[str, Any]] = {"gradual": {"every": 2}, "rigl": {"every": 2}, "lottery": {"rounds": 2}}


@pytest.fixture(scope="module")
def w() -> World:
    plain = world("projection", samples=256)
    return replace(plain, structure=with_weights(plain.structure))


@pytest.fixture(scope="module")
def bench(w: World) -> Bench:
    return bench_of(w)


def thinned(w: World) -> Policy:
    """Three quarters of the atoms, and three tenths of the weights that are left."""
    shares = {g.name: 0.3 if g.kind == "weight" else 0.75 for g in w.structure}
    return Policy.of({g.name: min(g.grid, key=lambda n: abs(n - shares[g.name] * g.width)) for g in w.structure})


@dataclass(frozen=True)
class Cut:
    """What cuts, and what it keeps at the policy."""

    bench: Bench
    evaluator: TieredEvaluator
    policy: Policy

    @property
    def kept(self) -> Kept:
        return self.bench.kept(self.evaluator, self.policy)

    @property
    def settled(self) -> nn.Module:
        """What is trained."""
        return self.bench.settled(self.evaluator, self.policy, self.kept)


@pytest.fixture(scope="module")
def cut(bench: Bench, w: World) -> Cut:
    return Cut(bench, finished(bench.evaluator(bench.dense, bench.structure, None)), thinned(w))


def started(cut: Cut, name: str, tmp_path: Path, place: Place | None = None) -> Any:
    early_of(cut.bench, tmp_path / "early.safetensors")
    weights = {"weights": tmp_path / "early.safetensors"} if name in ("rewind", "lottery") else {}
    options = {**OWN.get(name, {}), **weights, **RATE, "ema": 0.9, "checkpoint_every": 1}
    return recovering(cut.evaluator, cut.bench, cut.policy, cut.kept, training(name, options), place)


@pytest.mark.filterwarnings("ignore:.*steps of training did not make the model better")
@pytest.mark.parametrize("name", NAMES)
def test_the_zeros_of_the_point_are_there_at_the_end_and_a_stop_changes_nothing(
    name: str, cut: Cut, w: World, tmp_path: Path
) -> None:
    whole: Recovered = finished(started(cut, name, tmp_path))
    settled = cut.settled
    given = nonzeros(settled)
    assert nonzeros(whole.model) == given
    assert all(0 < given[g.name] < settled.get_parameter(g.name).numel() for g in w.structure if g.kind == "weight")
    if name in ("one_shot", "rewind"):
        assert all(bool((whole.model.get_parameter(n)[settled.get_parameter(n) == 0] == 0).all()) for n in given)
    for stop in (5, 10):
        place = Place(tmp_path / f"{stop}", "this one")
        for step in started(cut, name, tmp_path, place):
            if step.unit == "steps" and step.done == stop:
                break
        seen = list[Step]()
        again = finished(watched(started(cut, name, tmp_path, place), seen))
        assert [s.done for s in seen if s.unit == "steps"] == list(range(stop + 1, STEPS + 1))
        assert again.course == whole.course
        for key, value in whole.model.state_dict().items():
            assert torch.equal(value, again.model.state_dict()[key]), (stop, key)


@pytest.mark.filterwarnings("ignore:.*steps of training did not make the model better")
def test_a_model_that_is_denser_than_its_point_is_not_scored(cut: Cut, w: World, tmp_path: Path) -> None:
    steps = {name: finished(started(cut, name, tmp_path)).course["heldback"] for name in ("gradual", "lottery")}
    assert [step for step, _ in steps["gradual"]] == [0, 9, 12], "three quarters of twelve steps"
    assert [step for step, _ in steps["lottery"]] == [0, 9, 12], "the third of three trainings"


@pytest.mark.parametrize("name", ["gradual", "lottery"])
def test_what_finds_masks_of_its_own_starts_from_all_weights_of_the_atoms_that_are_kept(
    name: str, cut: Cut, w: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[nn.Module] = []

    def noted(self: Any, model: nn.Module, whole: nn.Module, *_: Any) -> list[Progress]:
        given.extend((model, whole))
        return []

    monkeypatch.setattr(f"autoprune.recovery.{name}.{name.capitalize()}.thin", noted)
    with pytest.warns(UserWarning, match="did not make the model better"):
        finished(started(cut, name, tmp_path))
    model, whole = given
    assert nonzeros(model) == nonzeros(cut.settled)
    assert {n: p.shape for n, p in whole.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(p.numel() == nonzeros(whole)[n] for n, p in whole.named_parameters() if p.dim() > 1)
    if name == "gradual":
        full = {g.name: g.width for g in w.structure if g.kind == "weight"}
        opened = Policy.of({**cut.policy.as_dict(), **full})
        expected = cut.bench.settled(cut.evaluator, opened, cut.kept)
    else:
        expected = copied(cut.bench.dense)
        expected.load_state_dict(early_of(cut.bench, tmp_path / "again.safetensors"))
        slim(expected, cut.bench.structure, cut.kept)
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in whole.state_dict().items())


def at_density(outputs: int, density: float, pattern: str = "") -> Cut:
    """A network of a 64 x 32 and an outputs x 64 matrix, whose weights alone are thinned.

    That of one output has a zero of its own, so that no zeros show which ones a mask made.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, outputs))
    if outputs == 1:
        with torch.no_grad():
            model[2].weight[:, 5] = 0.0
    plain = world_of(model, (32,), 256)
    whole = with_weights(plain.structure, pattern)
    widths = {g.name: round(density * g.width) for g in whole if g.kind == "weight"}
    groups = tuple(replace(g, grid=(widths[g.name], g.width)) for g in whole if g.kind == "weight")
    bench = bench_of(replace(plain, structure=replace(whole, groups=groups)))
    return Cut(bench, finished(bench.evaluator(bench.dense, bench.structure, None)), Policy.of(widths))


@pytest.mark.filterwarnings("ignore:.*steps of training did not make the model better")
@pytest.mark.parametrize("outputs", [1, 2, 10])
@pytest.mark.parametrize("density", [0.3, 0.85])
def test_scattered_zeros_are_no_pattern_and_their_number_is_exact(outputs: int, density: float, tmp_path: Path) -> None:
    cut = at_density(outputs, density)
    given = nonzeros(cut.settled)
    assert given == cut.policy.as_dict()
    for name in NAMES:
        assert nonzeros(finished(started(cut, name, tmp_path)).model) == given, name


@pytest.mark.filterwarnings("ignore:.*steps of training did not make the model better")
@pytest.mark.parametrize("name", ["one_shot", "rewind", "gradual", "lottery"])
def test_a_pattern_of_the_point_is_there_at_the_end(name: str, tmp_path: Path) -> None:
    cut = at_density(10, 0.5, "2:4")
    for weight in (p for p in finished(started(cut, name, tmp_path)).model.parameters() if p.dim() > 1):
        assert bool(((weight != 0).unflatten(1, (-1, 4)).sum(2) == 2).all())
