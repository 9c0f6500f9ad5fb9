"""The contract of every criterion: finite scores of the right shape, the model and global chance untouched."""

from __future__ import annotations

import copy

import pytest
import torch

from autoprune import plugins
from autoprune.errors import InputError
from autoprune.protocols import GramCriterion
from autoprune.structure import Group
from tests.small import world


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


INFORMED = ("bn_scale", "l1_norm", "l2_norm", "obs", "taylor")
"""Those of ours that look at the model; of a new file nobody knows."""


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
