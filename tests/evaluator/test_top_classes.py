"""Dense outputs over many classes: what is left out costs less than what sampling does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from autoprune import plugins
from autoprune.database.build import build_database
from autoprune.evaluation import Ask
from autoprune.evaluator import top_classes
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.evaluator.top_classes import TopClasses, joined_outputs, kept_classes
from autoprune.losses.kl import kl
from autoprune.policy import Policy
from tests.small import world_of

CLASSES = 4096


def logits(samples: int, axis: int = -1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Of a vocabulary in which few words are likely, dense and pruned: [samples, 3, classes] or classes at `axis`."""
    g = torch.Generator().manual_seed(seed)
    falling = -2.2 * torch.arange(1.0, CLASSES + 1).log()
    order = torch.rand(samples, 3, CLASSES, generator=g).argsort(-1)
    dense = falling[order] + 0.5 * torch.randn(samples, 3, CLASSES, generator=g)
    pruned = dense + 0.7 * torch.randn(samples, 3, CLASSES, generator=g)
    return dense.movedim(-1, axis), pruned.movedim(-1, axis)


@pytest.mark.parametrize("axis", [-1, 1])
def test_the_kl_of_the_likeliest_and_the_rest_is_below_the_whole_by_less_than_sampling_tells(axis: int) -> None:
    dense, pruned = logits(200, axis)
    k = kept_classes(dense, axis)
    assert k is not None
    assert 64 <= k <= CLASSES // 4
    whole, found = kl(pruned, dense, classes=axis), TopClasses.of(dense, axis, k).kl(pruned)
    assert bool((found <= whole + 1e-6).all())
    error, sampling = float((whole - found).mean()), float(whole.std()) / len(whole) ** 0.5
    assert 0.0 < error < sampling
    assert bool((found > 0.9 * whole).all())


def test_equal_outputs_are_at_no_distance_and_all_classes_give_the_whole() -> None:
    dense, pruned = logits(20)
    assert float(TopClasses.of(dense, -1, 128).kl(dense).abs().max()) == 0.0
    whole = TopClasses.of(dense, -1, CLASSES).kl(pruned)
    torch.testing.assert_close(whole, kl(pruned, dense, classes=-1), rtol=1e-3, atol=1e-5)


def test_few_classes_and_flat_distributions_are_kept_whole() -> None:
    assert kept_classes(torch.randn(8, 1000), -1) is None
    assert kept_classes(torch.randn(8, CLASSES), -1) is None, "a quarter of the classes does not hold the mass"


def test_parts_are_joined_along_the_samples() -> None:
    dense, pruned = logits(12)
    whole = TopClasses.of(dense, -1, 64)
    parts = joined_outputs([TopClasses.of(part, -1, 64) for part in dense.split(5)])
    assert isinstance(parts, TopClasses)
    assert torch.equal(parts.kl(pruned), whole.kl(pruned))
    assert torch.equal(joined_outputs(list(dense.split(5))), dense)  # type: ignore[arg-type]


@pytest.mark.parametrize("tier", ["stitch", "refit"])
def test_an_evaluator_keeps_the_likeliest_and_finds_nearly_the_same(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, CLASSES))
        model[2].weight.data.mul_(100.0)
    w = world_of(model.eval(), (6,), 64)
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "obs")())
    settings = Settings(loss="kl", calibration=64, validation=32, batch_size=16, device="cpu")
    ask = Ask(Policy.of({g.name: g.width // 2 for g in w.structure.groups}), tier)  # type: ignore[arg-type]
    thin = TieredEvaluator(w.task, w.structure, database, settings)
    found = thin(ask)
    assert isinstance(thin.samples.reference("heldback", 0, thin.batches("heldback")[0]).outputs, TopClasses)
    assert thin(replace(ask, policy=Policy.dense(w.structure))).loss == 0.0
    monkeypatch.setattr(top_classes, "MANY", CLASSES)
    whole = TieredEvaluator(w.task, w.structure, database, settings)(ask)
    assert found.loss == pytest.approx(whole.loss, rel=0.05)
