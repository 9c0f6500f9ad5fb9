"""What a candidate gets back (`evaluator.repair`): all, its norms alone, or nothing."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from autoprune import plugins
from autoprune.database.build import build_database
from autoprune.evaluation import Ask
from autoprune.evaluator.settings import Repair, Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.policy import Policy
from autoprune.tracing.slim import slim
from tests.small import World, world

SETTINGS = Settings(calibration=64, validation=32, finetune_steps=3, batch_size=16, device="cpu", precision="fp32")


def evaluator(w: World, repair: Repair) -> TieredEvaluator:
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "obs")())
    return TieredEvaluator(w.task, w.structure, database, replace(SETTINGS, repair=repair))


def half(w: World) -> Policy:
    return Policy.of({g.name: max(g.grid[0], g.width // 2) for g in w.structure.groups})


@pytest.mark.parametrize("tier", ["stitch", "refit"])
def test_without_repair_it_is_the_plain_slim_model(tier: str) -> None:
    w = world("projection")
    evaluate = evaluator(w, "none")
    ask = Ask(half(w), tier)  # type: ignore[arg-type]
    found = evaluate(ask)
    cut = copy.deepcopy(w.model)
    slim(cut, w.structure, {n: evaluate.stitcher.database.keep(n, width).tolist() for n, width in ask.policy.widths})
    for name, value in evaluate.repaired(ask).state_dict().items():
        assert torch.equal(value, cut.state_dict()[name]), name
    assert found.loss > 0
    assert found.passes == pytest.approx(evaluate.parts.fitness.samples / evaluate.parts.total)


def test_norms_alone_leave_all_weights_as_they_were_cut() -> None:
    w = world("projection")
    evaluate, plain = evaluator(w, "norm"), evaluator(w, "none")
    ask = Ask(half(w), "refit")
    corrected, cut = evaluate.repaired(ask).state_dict(), plain.repaired(ask).state_dict()
    changed = {name for name in cut if not torch.equal(corrected[name], cut[name])}
    assert changed
    assert all(name.endswith(("running_mean", "running_var")) for name in changed)


def test_the_full_repair_is_nearest_to_the_dense_model() -> None:
    w = world("projection")
    kinds: tuple[Repair, ...] = ("full", "norm", "none")
    full, norm, none = (evaluator(w, repair)(Ask(half(w), "refit")).loss for repair in kinds)
    assert full < min(norm, none)
