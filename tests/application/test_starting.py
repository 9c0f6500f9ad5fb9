"""Recoveries that do more than train what was cut: by rounds, from an early checkpoint, sparse before the cut."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autoprune.application.starting import Bench, Start, started
from autoprune.criteria import build_criterion
from autoprune.database.batches import Parts
from autoprune.errors import InputError, RunError
from autoprune.evaluator.prepared import prepared_model, prepared_parts
from autoprune.evaluator.settings import Settings
from autoprune.policy import Policy
from autoprune.protocols import Progress
from autoprune.recovery import Watched, build_recovery
from autoprune.recovery.iterative import Iterative
from autoprune.recovery.sparse_first import SparseFirst
from autoprune.tracing.copies import copied
from autoprune.tracing.slim import slim
from tests.small import World, world, world_of

STEPS = 12


@pytest.fixture(scope="module")
def w() -> World:
    return world("projection", samples=256)


@pytest.fixture(scope="module")
def bench(w: World) -> Bench:
    settings = Settings(calibration=128, validation=64, costs=(), precision="fp32")
    dense = prepared_model(w.task, settings.torch_device)
    parts: Parts = prepared_parts(w.task, settings, dense)
    return Bench(w.task, w.structure, settings, build_criterion("obs"), dense, parts, "refit")


def halved(w: World) -> Policy:
    return Policy.of({g.name: max(1, g.width // 2) for g in w.structure})


def kept(w: World) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(range(width)) for name, width in halved(w).widths}


def start(bench: Bench, w: World, name: str, options: Mapping[str, Any]) -> Start | None:
    return started(build_recovery(name, options), bench, halved(w), kept(w), STEPS, 0)


def fits(bench: Bench, found: Start) -> nn.Module:
    small = copied(bench.dense)
    slim(small, bench.structure, found.keep)
    small.load_state_dict(dict(found.weights))
    return small


def test_one_shot_starts_from_what_was_cut(bench: Bench, w: World) -> None:
    assert start(bench, w, "one_shot", {}) is None


def test_rounds_share_the_steps_and_what_is_gone_stays_gone(
    bench: Bench, w: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, on_the_way, cut = copy.deepcopy(bench.dense.state_dict()), list[Any](), Bench.cut

    def watched(self: Bench, model: nn.Module, policy: Policy, keep: Any) -> Any:
        on_the_way.append(cut(self, model, policy, keep))
        return on_the_way[-1]

    monkeypatch.setattr(Bench, "cut", watched)
    found = start(bench, w, "iterative", {"rounds": 3, "learning_rate": 0.01})
    assert found is not None
    assert found.steps == STEPS - 2 * (STEPS // 3)
    sets = [{name: set(atoms) for name, atoms in keep.items()} for _, keep in on_the_way]
    assert len(sets) == 3
    assert all(after[name] <= earlier[name] for earlier, after in pairwise(sets) for name in after)
    fits(bench, found)
    assert all(torch.equal(v, before[k]) for k, v in bench.dense.state_dict().items()), "the teacher is left alone"
    once = start(bench, w, "iterative", {"rounds": 1})
    assert once is not None
    assert once.steps == STEPS


def test_a_rewound_model_has_the_early_weights_of_the_atoms_that_are_kept(
    bench: Bench, w: World, tmp_path: Path
) -> None:
    early = {k: v + 0.25 if v.is_floating_point() else v for k, v in bench.dense.state_dict().items()}
    save_file({k: v.contiguous() for k, v in early.items()}, tmp_path / "early.safetensors")
    found = start(bench, w, "rewind", {"weights": tmp_path / "early.safetensors"})
    assert found is not None
    assert (found.keep, found.steps) == (kept(w), STEPS)
    expected = copied(bench.dense)
    expected.load_state_dict(early)
    slim(expected, bench.structure, kept(w))
    assert all(torch.equal(found.weights[name], value) for name, value in expected.state_dict().items())


@pytest.mark.parametrize("penalty", ["group_lasso", "bn_l1"])
def test_a_penalty_pulls_atoms_to_zero_before_the_cut(bench: Bench, w: World, penalty: str) -> None:
    found = start(bench, w, "sparse_first", {"penalty": penalty, "share": 0.25, "learning_rate": 0.01})
    assert found is not None
    assert found.steps == STEPS - STEPS // 4
    fits(bench, found)
    model = copied(bench.dense)
    strong = SparseFirst(penalty=penalty, strength=100.0, learning_rate=0.02)
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


def test_a_training_on_the_way_that_diverges_is_one_line(bench: Bench, w: World) -> None:
    with pytest.raises(RunError, match=r"in round 1 of 3 diverged .*set a lower recovery.options.learning_rate"):
        started(Watched("diverging", Diverging()), bench, halved(w), kept(w), STEPS, 0)


def test_bn_l1_shrinks_scales_of_batch_norms_and_nothing_else() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8)),
            *(nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)),
        )
        slopes = nn.Sequential(nn.Linear(6, 8), nn.PReLU(8), nn.Linear(8, 3))
    w = world_of(net.eval(), (3, 4, 4), 64)
    model, recovery = copy.deepcopy(w.model), SparseFirst(penalty="bn_l1", strength=50.0, learning_rate=0.01)
    list(recovery.before(model, w.model, w.structure.groups, w.task, 20, 0))
    shrunk, held = model.state_dict(), w.model.state_dict()
    assert float(shrunk["1.weight"].norm()) < 0.1 * float(held["1.weight"].norm())
    assert float(shrunk["3.weight"].norm()) > 0.5 * float(held["3.weight"].norm())
    other = world_of(slopes.eval(), (6,), 64)
    with pytest.raises(InputError, match="bn_l1 needs batch norms behind the groups"):
        recovery.before(copy.deepcopy(other.model), other.model, other.structure.groups, other.task, 4, 0)
