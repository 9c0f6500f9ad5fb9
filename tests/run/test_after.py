"""The re-ranking: fitness and held-back samples count alike, and what fitness does not know stands by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autoprune.evaluation import Ask, Evaluation, Split
from autoprune.policy import Policy
from autoprune.run.after import MAX_POINTS, heldback_asks, reranked, winners
from autoprune.run.setting import Setting
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    from autoprune.files.job import Job
    from autoprune.run.prepare import prepare

    untuned = ("evaluator.finalists=0", "evaluator.finetune_steps=0")  # or the rate of a fine-tune is probed, in vain
    return prepare(Job.load(ROOT / "search_spaces" / "digits.yaml", untuned), tmp_path_factory.mktemp("run"))


def measured(setting: Setting, share: float, split: Split, loss: float, fraction: float = 1.0) -> Evaluation:
    policy = Policy.of({g.name: g.grid[int(share * (len(g.grid) - 1))] for g in setting.structure.groups})
    costs = {name: float(cost(policy.array(setting.structure))) for name, cost in setting.problem.costs.items()}
    return Evaluation(Ask(policy, setting.tier, fraction, split), loss, costs)


def test_every_sample_counts_alike_in_a_re_ranking(setting: Setting) -> None:
    fitness, heldback = setting.prices.fitness, setting.prices.heldback
    rng, told, held = np.random.default_rng(0), [], []
    for share in (0.2, 0.3, 0.4):
        losses = rng.exponential(size=fitness + heldback)
        told += [measured(setting, share, "fitness", 99.0, 0.25)]
        told += [measured(setting, share, "fitness", float(losses[:fitness].mean()))]
        held += [measured(setting, share, "heldback", float(losses[fitness:].mean()))]
        assert reranked(told, held, setting.tier, setting.prices)[-1].loss == pytest.approx(losses.mean())
    failed = Evaluation.failed(held[0].ask, "NaN", {}, 0.0)
    assert [e.ask for e in reranked(told, [failed, *held], setting.tier, setting.prices)] == [e.ask for e in held]
    assert [e.loss for e in reranked([], held, setting.tier, setting.prices)] == pytest.approx([e.loss for e in held])


def test_the_winner_is_that_of_all_samples_or_of_the_held_back_ones_after_a_fine_tune(setting: Setting) -> None:
    told = [measured(setting, 0.2, "fitness", 0.1), measured(setting, 0.3, "fitness", 0.3)]
    held = [measured(setting, 0.2, "heldback", 0.3), measured(setting, 0.3, "heldback", 0.2)]
    budget = max(setting.problem.budget.at)
    ranked = reranked(told, held, setting.tier, setting.prices)
    assert winners(ranked, [], setting.problem.budget, ())[budget] == held[0].ask.policy
    assert winners(ranked, held, setting.problem.budget, ())[budget] == held[1].ask.policy


def test_a_budget_whose_finalists_all_failed_keeps_its_best_before_the_fine_tune(setting: Setting) -> None:
    held = [measured(setting, 0.2, "heldback", 0.3), measured(setting, 0.9, "heldback", 0.1)]
    tuned = [Evaluation.failed(held[0].ask, "the loss is nan", held[0].costs), held[1]]
    found = winners(held, tuned, setting.problem.budget, ())
    assert held[1].costs["macs"] > 0.7 > 0.3 > held[0].costs["macs"]
    assert set(found.values()) == {held[0].ask.policy}


@pytest.mark.parametrize("objectives", [("macs",), ("macs", "params"), ("params", "macs")])
def test_a_thinned_front_keeps_the_best_within_each_asked_budget(setting: Setting, objectives: tuple[str, ...]) -> None:
    narrow = replace(setting.problem, objectives=objectives)
    groups = narrow.structure.groups
    dense = Policy.dense(narrow.structure).as_dict()
    told = []
    for i, (name, width) in enumerate((g.name, w) for g in groups for w in g.grid[:-1]):
        macs, ask = 0.21 + 0.005 * i, Ask(Policy.of({**dense, name: width}), narrow.tier)
        told.append(Evaluation(ask, 1 - macs, {"macs": macs, "params": (0.37 * i) % 1}))
    asked = [ask.policy for _, ask in heldback_asks(told, {}, narrow, ())]
    assert len(told) > len(asked) == MAX_POINTS
    for at in narrow.budget.at:
        assert min((e for e in told if e.costs["macs"] <= at), key=lambda e: e.loss).ask.policy in asked
