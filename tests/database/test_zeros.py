"""Zeros that a model brings stay zero through compensation, refit and fine-tune; whole dead channels are no pattern."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from autoprune.database.zeros import MEANT, masked, masked_weights, patterned, patterned_weights, said_of
from autoprune.evaluation import Ask
from autoprune.tracing.rounding import nearest
from tests.evaluator.test_tiers import evaluator, narrow
from tests.small import World, world, world_of


def two_of_four(weight: Tensor) -> None:
    """Of every four input channels at a position the two smallest go."""
    flat = weight.movedim(1, -1)
    groups = flat.reshape(-1, 4)
    small = groups.abs().argsort(1)[:, :2]
    flat.copy_(groups.scatter(1, small, 0.0).view(flat.shape))


def sparse_world() -> World:
    model = copy.deepcopy(world("projection", samples=256).task.model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 4 and p.shape[1] % 4 == 0:
                two_of_four(p)
                assert patterned(p), name
    return world_of(model, (3, 8, 8), 256)


@pytest.mark.parametrize("tier", ["stitch", "refit", "tune"])
def test_the_zeros_of_a_pattern_stay_through_every_repair(tier: str) -> None:
    w = sparse_world()
    names = sorted(patterned_weights(w.model))
    assert len(names) == 5
    evaluate = evaluator(w, calibration=256, learning_rate=0.02)
    policy = narrow(w)
    small = evaluate.repaired(Ask(policy, tier))  # type: ignore[arg-type]
    for name in names:
        rows, columns = (evaluate.stitcher.kept(name, dim) for dim in (0, 1))
        was = w.model.state_dict()[name]
        was = was if rows is None else was[rows]
        was = was if columns is None else was[:, columns]
        now = small.state_dict()[name]
        assert bool((now[was == 0] == 0).all()), name
        assert bool((now[was != 0] != 0).any()), name
    assert evaluate(Ask(policy, tier)).ok  # type: ignore[arg-type]
    assert "stay" in said_of(w.model)


def test_dead_channels_and_dense_weights_are_no_pattern() -> None:
    weight = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    assert not patterned(weight)
    weight[:6] = 0.0
    weight[:, :4] = 0.0
    assert not patterned(weight)
    weight[6:, 4:, 0] = 0.0
    assert patterned(weight)
    assert not patterned(torch.zeros(8, 8))
    assert not patterned(torch.zeros(8))
    assert said_of(world("projection").model) == ""


def scattered(shape: tuple[int, ...], share: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) >= share)


def test_a_mask_is_a_twentieth_of_zeros_and_a_pattern_a_quarter() -> None:
    for share, found in ((0.02, (False, False)), (0.1, (True, False)), (0.5, (True, True))):
        weight = scattered((64, 64), share)
        assert (masked(weight), patterned(weight)) == found
    assert not masked(torch.zeros(8))


def test_rows_that_are_zero_as_a_whole_are_a_mask_where_the_dense_model_has_none() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    small = copy.deepcopy(dense)
    with torch.no_grad():
        for layer in small:
            layer.weight[:, :2] = 0.0
    assert masked_weights(small) == frozenset()
    assert masked_weights(small, dense) == {"0.weight", "1.weight"}
    with torch.no_grad():
        dense[1].weight[:, 5] = 0.0
    assert masked_weights(small, dense) == {"0.weight", "1.weight"}, "one column of two is the mask's"
    with torch.no_grad():
        dense[1].weight[:, 6] = 0.0
    assert masked_weights(small, dense) == {"0.weight"}, "the dense model has as many dead columns of its own"
    assert masked_weights(dense, dense) == frozenset()


def test_a_mask_of_a_single_output_shows_beside_a_dead_input_of_the_dense_model() -> None:
    dense, small = nn.Sequential(nn.Linear(16, 1)), nn.Sequential(nn.Linear(16, 1))
    with torch.no_grad():
        dense[0].weight.fill_(1.0)[:, 3] = 0.0
        small[0].weight.copy_(dense[0].weight)
    assert masked_weights(small, dense) == frozenset()
    with torch.no_grad():
        small[0].weight[:, 8:] = 0.0
    assert masked_weights(small, dense) == {"0.weight"}
    with torch.no_grad():
        dense[0].weight.zero_()
    assert masked_weights(small, dense) == frozenset(), "what begins at zero shows no mask"


def test_what_8_bits_round_to_zero_is_no_mask() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    for share, found in ((0.0, frozenset()), (0.1, {"0.weight"}), (0.9, {"0.weight"})):
        weight = scattered((64, 64), share)
        weight[:, 0] = 30.0
        model[0].weight.data = nearest(weight).weight
        assert float((model[0].weight == 0).float().mean()) > MEANT
        assert masked(model[0].weight), share
        assert masked_weights(model) == found, share
