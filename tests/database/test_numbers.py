"""Zeros in the stitched model: as many as the policy says, what is left making up for them, nothing else changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autoprune import plugins
from autoprune.database.build import build_database
from autoprune.database.stitch import Stitcher
from autoprune.database.store import LevelDatabase
from autoprune.errors import InputError
from autoprune.matrices import with_precisions, with_weights
from autoprune.policy import Policy
from autoprune.structure import Structure
from autoprune.tracing.masks import digest
from autoprune.tracing.rounding import is_rounded, output_dim
from tests.small import World, world


class Magnitude:
    """|w| of single weights, and the sum of an atom's."""

    def __call__(self, model, groups, task):  # type: ignore[no-untyped-def]
        return plugins.load("criteria", "l1_norm")()(model, groups, task)

    def weights(self, model, names, task):  # type: ignore[no-untyped-def]
        return {name: model.get_parameter(name).detach().abs() for name in names}


def sparse_world(family: str = "projection", pattern: str = "", structured: bool = False, bits: bool = False) -> World:
    w = world(family)
    structure = with_weights(w.structure, pattern)
    structure = with_precisions(structure, (32, 8)) if bits else structure
    groups = tuple(g for g in structure if structured or g.matrices)
    return replace(w, structure=Structure(groups, structure.ops, dict(structure.frozen), structure.fingerprint))


def built(w: World, criterion: object = None) -> LevelDatabase:
    return build_database(w.model, w.structure, w.seen, criterion or plugins.load("criteria", "obs")())  # type: ignore[arg-type]


def at(w: World, density: float, **bits: int) -> Policy:
    """Every weight near a density, everything else at random."""
    rng = np.random.default_rng(0)
    near = {g.name: min(g.grid, key=lambda x: abs(x - density * g.width)) for g in w.structure if g.kind == "weight"}
    rest = {g.name: int(rng.choice(g.grid)) for g in w.structure if g.kind != "weight"}
    return Policy.of({**rest, **near})


@pytest.mark.parametrize("criterion", [None, Magnitude()])
def test_as_many_numbers_stay_as_the_policy_says_and_biases_and_norms_do_not_change(criterion: object) -> None:
    w = sparse_world()
    stitcher = Stitcher(w.model, w.structure, built(w, criterion))
    policy = at(w, 0.3)
    model = stitcher.stitch(policy)
    for name, tensor in model.state_dict().items():
        if name in policy.as_dict():
            assert int((tensor != 0).sum()) == policy.as_dict()[name], name
            assert torch.equal(tensor != 0, stitcher.masks[name])
        else:
            assert torch.equal(tensor, w.model.state_dict()[name]), name
    back = stitcher.stitch(Policy.dense(w.structure))
    assert not stitcher.masks
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, w.model.state_dict()[name]), name


def test_numbers_that_stay_make_up_for_the_rest_with_obs_and_stay_as_they_are_with_magnitude() -> None:
    w = sparse_world()
    by_factor = Stitcher(w.model, w.structure, built(w))
    by_size = Stitcher(w.model, w.structure, built(w, Magnitude()))
    bare = Stitcher(w.model, w.structure, built(w), compensated=False)
    policy, moved, name = at(w, 0.5), 0, w.structure.names[1]
    dense, (x,) = w.model.get_parameter(name).detach(), w.task.example_inputs()
    kept = by_size.stitch(policy).get_parameter(name).detach()
    assert torch.equal(
        kept, dense * (dense.abs() >= dense.abs().flatten().sort(descending=True)[0][kept.count_nonzero() - 1])
    )
    found = bare.stitch(policy).get_parameter(name).detach()
    assert torch.equal(found, dense * (found != 0))
    for own in w.structure.names:
        one = by_factor.stitch(policy).get_parameter(own)
        moved += int((one != w.model.get_parameter(own))[one != 0].sum())
    assert moved > 0
    with torch.no_grad():
        wanted = w.model(x)
        lost = [float((s.stitch(at(w, 0.5))(x) - wanted).square().mean()) for s in (by_factor, by_size)]
    assert lost[0] < lost[1]


@pytest.mark.parametrize("pattern", ["2:4", "1:2"])
def test_a_pattern_holds_where_the_policy_asks_for_it(pattern: str) -> None:
    w = sparse_world(pattern=pattern)
    n, m = map(int, pattern.split(":"))
    model = Stitcher(w.model, w.structure, built(w)).stitch(at(w, n / m))
    for g in w.structure:
        runs = (model.get_parameter(g.name) != 0).movedim(1, -1).unflatten(-1, (-1, m)).sum(-1)
        assert bool((runs == n).all()), g.name
    assert any("does not divide" in why for why in w.structure.frozen.values())  # the stem reads three channels


def test_of_what_channels_leave_the_same_share_stays_and_the_model_runs() -> None:
    w = sparse_world(structured=True)
    stitcher = Stitcher(w.model, w.structure, built(w))
    policy = at(w, 0.3)
    model = stitcher.stitch(policy)
    for g in (g for g in w.structure if g.kind == "weight"):
        tensor = model.get_parameter(g.name)
        wanted = policy.as_dict()[g.name] * tensor.numel() / g.width
        assert abs(int((tensor != 0).sum()) - wanted) <= 0.5
    with torch.no_grad():
        first = model(*w.task.example_inputs())
        fresh = Stitcher(w.model, w.structure, built(w)).stitch(policy)(*w.task.example_inputs())
    assert torch.equal(first, fresh)


def test_zeros_stay_where_the_rest_is_rounded() -> None:
    w = sparse_world(bits=True)
    policy = Policy.of({**at(w, 0.3).as_dict(), **{g.name: 8 for g in w.structure if g.kind == "bits"}})
    stitcher = Stitcher(w.model, w.structure, built(w))
    model, rounded = stitcher.stitch(policy), 0
    for g in (g for g in w.structure if g.kind == "bits"):
        for name in g.matrices:
            tensor = model.get_parameter(name).detach()
            assert bool((tensor[~stitcher.masks[name]] == 0).all())
            rounded += is_rounded(tensor, output_dim(model.get_submodule(name.rpartition(".")[0])))
    assert rounded


def test_a_database_from_a_file_gives_the_same_masks(tmp_path: Path) -> None:
    w = sparse_world()
    made = built(w)
    made.save(tmp_path / "levels.safetensors")
    opened = LevelDatabase.open(tmp_path / "levels.safetensors")
    one, other = Stitcher(w.model, w.structure, made), Stitcher(w.model, w.structure, opened)
    one.stitch(at(w, 0.2)), other.stitch(at(w, 0.2))
    assert one.mask_digests() == other.mask_digests()
    assert one.mask_digests() == {name: digest(mask) for name, mask in one.masks.items()}
    scores = made.scores(w.structure)
    assert all(scores[g.name].shape == (g.width,) and np.isfinite(scores[g.name]).all() for g in w.structure)


def test_a_criterion_that_scores_no_single_weights_is_refused_in_one_line() -> None:
    w = sparse_world()
    with pytest.raises(InputError, match=r"criterion bn_scale scores no single weights, .*: take obs"):
        built(w, plugins.load("criteria", "bn_scale")())


class Wrong(Magnitude):
    def weights(self, model, names, task):  # type: ignore[no-untyped-def]
        return {name: model.get_parameter(name).detach().sum(0) for name in names}


def test_scores_of_another_shape_are_refused_by_name() -> None:
    w = sparse_world()
    with pytest.raises(InputError, match=r"must score \S+ in its shape"):
        built(w, Wrong())


def test_a_weight_whose_inputs_nobody_knows_is_masked_by_its_own_size() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    weight = model[0].weight.detach()
    from autoprune.database.masking import weight_scores
    from autoprune.structure import Group

    group = Group("0.weight", "weight", 64, (), (32, 64), matrices=("0.weight",))
    scores = weight_scores(model, group, [])
    assert torch.allclose(scores, (weight.square() / weight.square().sum()).flatten())
