"""Stitching: from one candidate to the next, always what a fresh model would be."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from autoprune import plugins
from autoprune.database.build import build_database
from autoprune.database.stitch import Stitcher
from autoprune.database.store import LevelDatabase, database_key
from autoprune.errors import InputError
from autoprune.policy import Policy
from autoprune.structure import Structure
from autoprune.tracing.fingerprint import weights_fingerprint
from autoprune.tracing.verify import audit, masked, relative_error
from tests.families import FAMILIES
from tests.small import World, world


def random_policy(structure: Structure, rng: np.random.Generator) -> Policy:
    return Policy.of({g.name: int(rng.choice(g.grid)) for g in structure.groups})


def built(w: World, criterion: str = "obs") -> LevelDatabase:
    return build_database(w.model, w.structure, w.seen, plugins.load("criteria", criterion)())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stitched_model_equals_its_masked_reference_and_a_fresh_stitch(family: str) -> None:
    w = world(family)
    database = built(w)
    stitcher, rng = Stitcher(w.model, w.structure, database), np.random.default_rng(0)
    x = w.task.example_inputs()
    for _ in range(4):
        policy = random_policy(w.structure, rng)
        with torch.no_grad():
            y = stitcher.stitch(policy)(*x)
            fresh = Stitcher(w.model, w.structure, database).stitch(policy)(*x)
        assert torch.equal(y, fresh)
        audit(stitcher.model)
        keep = {n: database.keep(n, width).tolist() for n, width in policy.widths}
        reference = masked(w.model, stitcher.model, w.structure, keep)
        with torch.no_grad():
            assert relative_error(y, reference(*x)) < 1e-5


def test_back_at_the_dense_policy_the_model_is_bit_for_bit_the_dense_one() -> None:
    w = world("projection")
    stitcher = Stitcher(w.model, w.structure, built(w))
    stitcher.stitch(random_policy(w.structure, np.random.default_rng(0)))
    stitcher.mark_dirty()
    stitcher.stitch(Policy.dense(w.structure))
    for (name, a), b in zip(stitcher.model.state_dict().items(), w.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_tensor_under_two_names_is_renewed_once() -> None:
    w = world("plain")
    model = copy.deepcopy(w.model)
    model.add_module("second", model.get_submodule("conv2"))  # sorted behind the first name
    stitcher = Stitcher(model, w.structure, built(w))
    policy = random_policy(w.structure, np.random.default_rng(0))
    stitcher.mark_dirty()
    with torch.no_grad():
        y = stitcher.stitch(policy)(*w.task.example_inputs())
        plain = Stitcher(w.model, w.structure, built(w)).stitch(policy)(*w.task.example_inputs())
    assert torch.equal(y, plain)


def test_what_a_repair_overwrote_is_renewed_and_the_rest_is_not_touched() -> None:
    w = world("plain")
    stitcher = Stitcher(w.model, w.structure, built(w))
    policy = random_policy(w.structure, np.random.default_rng(1))
    stitcher.stitch(policy)
    name = w.structure.groups[0].slices[0].tensor
    clean = stitcher.live[name].detach().clone()
    stitcher.live[name].data = clean + 1.0
    stitcher.mark_dirty({name})
    stitcher.stitch(policy)
    assert torch.equal(stitcher.live[name], clean)
    before = {n: t.data_ptr() for n, t in stitcher.live.items()}
    stitcher.stitch(policy)
    assert before == {n: t.data_ptr() for n, t in stitcher.live.items()}


def test_the_lent_model_is_untouched_and_a_width_off_the_grid_is_refused() -> None:
    w = world("plain")
    before = copy.deepcopy(w.model.state_dict())
    stitcher = Stitcher(w.model, w.structure, built(w))
    stitcher.stitch(random_policy(w.structure, np.random.default_rng(2)))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), w.model.state_dict().values(), strict=True))
    wrong = Policy.of({g.name: g.width + 1 for g in w.structure.groups})
    with pytest.raises(InputError, match="its grid is"):
        stitcher.stitch(wrong)


def test_the_key_follows_weights_data_criterion_and_grids() -> None:
    w, other = world("plain"), world("plain", samples=48)
    weights = weights_fingerprint(w.model)
    key = database_key(weights, w.structure, w.seen, "obs")
    assert key == database_key(weights, w.structure, w.seen, "obs")
    changed = copy.deepcopy(w.model)
    next(changed.parameters()).data += 1.0
    keys = {
        key,
        database_key(weights, w.structure, w.seen, "l1_norm"),
        database_key(weights, w.structure, other.seen, "obs"),
        database_key(weights_fingerprint(changed), w.structure, w.seen, "obs"),
    }
    assert len(keys) == 4


def test_given_kept_atoms_are_what_their_width_holds() -> None:
    w = world("plain")
    keep = {g.name: tuple(range(g.width - g.width // 2, g.width)) for g in w.structure.groups}
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "l2_norm")(), keep)
    for name, atoms in keep.items():
        assert tuple(database.keep(name, len(atoms)).tolist()) == atoms
