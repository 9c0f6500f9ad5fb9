"""The contract of every criterion, of atoms and of weights: finite scores of the right shape, nothing else touched."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from autoprune import plugins
from autoprune.errors import InputError
from autoprune.matrices import weights_of
from autoprune.protocols import GramCriterion, WeightCriterion
from autoprune.structure import Group
from tests.small import World, world


@pytest.mark.parametrize("family", ["projection", "mobilenet"])
@pytest.mark.parametrize("name", plugins.names("criteria"))
def test_scores_are_finite_one_an_atom_and_the_model_is_untouched(name: str, family: str) -> None:
    w = world(family)
    groups = [g for g in w.structure.groups if g.kind != "block" and (name != "bn_scale" or _has_norm(g))]
    state, flags = copy.deepcopy(w.model.state_dict()), [p.requires_grad for p in w.model.parameters()]
    chance = torch.get_rng_state()
    scores = plugins.load("criteria", name)()(w.model, groups, w.seen)
    assert torch.equal(chance, torch.get_rng_state())
    assert {n: tuple(s.shape) for n, s in scores.items()} == {g.name: (g.width,) for g in groups}
    assert all(bool(torch.isfinite(s).all()) for s in scores.values())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), w.model.state_dict().values(), strict=True))
    assert flags == [p.requires_grad for p in w.model.parameters()]
    assert not w.model.training
    assert all(p.grad is None for p in w.model.parameters())
    again = plugins.load("criteria", name)()(w.model, groups, w.seen)
    assert all(torch.equal(again[n], s) for n, s in scores.items())


INFORMED = ("bn_scale", "fisher", "fpgm", "l1_norm", "l2_norm", "obs", "snip", "synflow", "taylor", "wanda")
"""Those of ours that look at the model and never score below 0; of a new file nobody knows."""
SIGNED = ("grasp", "movement")
"""Those that score what is no use at all with 0, and what does harm below."""


def test_dead_channels_go_first_by_every_informed_criterion() -> None:
    w = world("plain")
    group = w.structure.groups[0]
    dead = 2
    tensors = w.model.state_dict(keep_vars=True)
    with torch.no_grad():
        for s in group.slices:
            if s.role != "consume" and "running" not in s.tensor:
                tensors[s.tensor].index_fill_(s.dim, torch.tensor(list(s.positions(dead))), 0.0)
    for name in INFORMED:
        if name == "bn_scale" and not _has_norm(group):
            continue
        scores = plugins.load("criteria", name)()(w.model, [group], w.seen)[group.name]
        assert int(scores.argmin()) == dead, name
    for name in SIGNED:
        scores = plugins.load("criteria", name)()(w.model, [group], w.seen)[group.name]
        assert scores[dead] == 0, name
        assert scores.count_nonzero() == group.width - 1, name


OF_WEIGHTS = tuple(n for n in plugins.names("criteria") if isinstance(plugins.load("criteria", n)(), WeightCriterion))


def test_all_of_ours_score_weights_but_those_for_which_it_makes_no_sense() -> None:
    assert set(plugins.SHIPPED["criteria"]) - set(OF_WEIGHTS) == {"bn_scale", "fpgm", "obs"}
    assert {*INFORMED, *SIGNED, "random"} == set(plugins.SHIPPED["criteria"])


@pytest.mark.parametrize("family", ["resnext", "unet"])
@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_scores_of_weights_have_their_shapes_and_the_model_is_untouched(name: str, family: str) -> None:
    w = world(family)
    names = [spec.name for _, spec in weights_of(w.structure)]
    shapes = {n: tuple(p.shape) for n, p in w.model.named_parameters() if n in names}
    w.model.train()  # as a model is lent; it is scored in eval mode
    next(w.model.parameters()).requires_grad_(False)
    state, flags = copy.deepcopy(w.model.state_dict()), [p.requires_grad for p in w.model.parameters()]
    chance = torch.get_rng_state()
    scores = _of_weights(name, w, names)
    assert torch.equal(chance, torch.get_rng_state())
    assert {n: tuple(s.shape) for n, s in scores.items()} == shapes
    assert all(bool(torch.isfinite(s).all()) and not s.requires_grad for s in scores.values())
    assert all(s.unique().numel() > 1 for s in scores.values())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), w.model.state_dict().values(), strict=True))
    assert flags == [p.requires_grad for p in w.model.parameters()]
    assert w.model.training
    assert all(p.grad is None for p in w.model.parameters())
    w.model.eval()
    again = _of_weights(name, w, names)
    assert all(torch.equal(again[n], s) for n, s in scores.items())
    alone = _of_weights(name, w, names[1:2])
    assert list(alone) == names[1:2]
    assert torch.equal(alone[names[1]], scores[names[1]])


def test_weights_of_zero_go_first_by_every_informed_criterion() -> None:
    w = world("projection")
    names = [spec.name for _, spec in weights_of(w.structure)]
    tensors, gone = w.model.state_dict(keep_vars=True), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n in names:
            tensors[n].mul_(torch.rand(tensors[n].shape, generator=gone) < 0.5)
    for name in {*INFORMED, "grasp"} & {*OF_WEIGHTS}:  # movement brings them back
        for n, score in _of_weights(name, w, names).items():
            own, dead = score.double(), tensors[n] == 0
            assert own[dead].abs().max() == 0, (name, n)
            assert name in SIGNED or own[~dead].min() >= 0, (name, n)
            assert own[~dead].abs().mean() > 0, (name, n)


def _of_weights(name: str, w: World, names: Sequence[str]) -> Mapping[str, Tensor]:
    criterion = plugins.load("criteria", name)()
    assert isinstance(criterion, WeightCriterion)
    return criterion.weights(w.model, names, w.seen)


def test_bn_scale_names_a_group_without_a_norm() -> None:
    w = world("plain")
    bare = [g for g in w.structure.groups if not _has_norm(g)]
    assert bare
    with pytest.raises(InputError, match=f"no batch norm follows group '{bare[0].name}'"):
        plugins.load("criteria", "bn_scale")()(w.model, bare, w.seen)


def test_obs_from_the_grams_of_the_database_is_obs_by_itself() -> None:
    from autoprune.database.build import build_database

    w = world("plain")
    criterion = plugins.load("criteria", "obs")()
    assert isinstance(criterion, GramCriterion)
    alone = criterion(w.model, w.structure.groups, w.seen)
    stored = build_database(w.model, w.structure, w.seen, criterion).scores(w.structure)
    assert all((alone[n].double().numpy() == s).all() for n, s in stored.items())


def _has_norm(group: Group) -> bool:
    return any("running_mean" in s.tensor for s in group.slices)
