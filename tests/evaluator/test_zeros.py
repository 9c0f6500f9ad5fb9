"""Evaluations of weights with zeros: repaired within their masks, trained within them, told apart by their hashes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from autoprune.evaluation import Ask
from autoprune.matrices import with_weights
from autoprune.policy import Policy
from autoprune.structure import Structure
from tests.database.test_numbers import at, sparse_world
from tests.evaluator.test_tiers import evaluator
from tests.small import World, world_of


def lost(w: World, tier: str, repair: str = "full") -> float:
    e = evaluator(w, repair=repair)(Ask(at(w, 0.3), tier, split="validation"))  # type: ignore[arg-type]
    assert e.ok, e.error
    return e.loss


def test_the_refit_stays_within_the_masks_and_makes_the_loss_smaller() -> None:
    w = sparse_world()
    evaluate = evaluator(w)
    model = evaluate.repaired(Ask(at(w, 0.3), "refit"))
    for name, mask in evaluate.stitcher.masks.items():
        assert bool((model.get_parameter(name)[~mask] == 0).all()), name
    assert lost(w, "refit") < lost(w, "stitch") < lost(w, "stitch", "none")


def test_the_refit_of_rounded_weights_keeps_their_zeros() -> None:
    w = sparse_world(bits=True)
    policy = Policy.of({**at(w, 0.3).as_dict(), **{g.name: 8 for g in w.structure if g.kind == "bits"}})
    evaluate = evaluator(w)
    model = evaluate.repaired(Ask(policy, "refit"))
    for name, mask in evaluate.stitcher.masks.items():
        assert bool((model.get_parameter(name)[~mask] == 0).all()), name


def test_a_brief_training_moves_no_zero() -> None:
    w = sparse_world()
    evaluate = evaluator(w)
    model = evaluate.repaired(Ask(at(w, 0.3), "tune"))
    for name, mask in evaluate.stitcher.masks.items():
        assert bool((model.get_parameter(name)[~mask] == 0).all()), name


@pytest.mark.parametrize("structured", [False, True])
def test_masks_are_told_on_validation_and_repeat(structured: bool) -> None:
    w = sparse_world(structured=structured)
    first, again = (evaluator(w)(Ask(at(w, 0.3), "refit", split="validation")) for _ in range(2))
    weights = {g.name for g in w.structure if g.kind == "weight"}
    assert first.masks.keys() == weights
    assert (first.masks, first.loss) == (again.masks, again.loss)
    assert evaluator(w)(Ask(at(w, 0.3), "refit")).masks == {}


def test_the_dense_policy_is_exact() -> None:
    w = sparse_world()
    e = evaluator(w)(Ask(Policy.dense(w.structure), "refit", split="validation"))
    assert abs(e.loss) <= 1e-7
    assert e.masks == {}


def test_masks_are_held_where_zeros_do_not_show_them() -> None:
    """A single output has no zeros but whole columns, and a weight that begins at zero has nothing else."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.Linear(16, 1))
    net[3].weight.data.zero_()
    w = world_of(net, (24,), 64)
    structure = with_weights(w.structure)
    w = replace(w, structure=Structure(tuple(g for g in structure if g.matrices), structure.ops))
    evaluate = evaluator(w)
    policy = at(w, 0.3)
    model = evaluate.repaired(Ask(policy, "tune"))
    assert evaluate.stitcher.masks.keys() == set(policy.as_dict())
    for name, mask in evaluate.stitcher.masks.items():
        assert int(mask.sum()) == policy.as_dict()[name]
        assert bool((model.get_parameter(name)[~mask] == 0).all()), name
