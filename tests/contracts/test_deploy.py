"""The contract of every container: it leaves less or as much, on grids that were there, and says why the rest stays."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune import plugins
from autoprune.deploy import misfits, searched
from autoprune.families import analyze
from autoprune.policy import Policy
from autoprune.space import Space
from autoprune.structure import Structure
from tests.transformer_models import MODELS

each = pytest.mark.parametrize("name", plugins.names("deploy"))


@pytest.fixture(scope="module")
def llama() -> Structure:
    small = MODELS["llama"]
    return analyze(small.build(), small.example())


@each
def test_what_it_holds_is_part_of_what_there_is_and_the_rest_says_why(name: str, llama: Structure) -> None:
    held = searched(llama, Space(), name)
    assert held.fingerprint == llama.fingerprint
    before = {(s.tensor, s.dim) for g in llama for s in g.slices}
    assert {(s.tensor, s.dim) for g in held for s in g.slices} <= before
    whole = {g.width: set(g.grid) for g in llama}
    assert all(set(g.grid) <= whole[g.width] and g.grid[-1] == g.width and len(g.grid) > 1 for g in held)
    gone = {g.name for g in llama if g.kind != "block"} - {g.name for g in held}
    assert all(part in held.frozen or "*" in "".join(held.names) for part in gone)
    assert {n for op in held.ops for n in op.groups} <= {*held.names, *llama.names}


@each
def test_the_dense_model_fits_and_so_does_whatever_its_grids_allow(name: str, llama: Structure) -> None:
    held = searched(llama, Space(), name)
    rng = np.random.default_rng(0)
    assert misfits(held, Policy.dense(held), name) == []
    for _ in range(5):
        policy = Policy.from_array(held, [int(rng.choice(g.grid)) for g in held])
        assert misfits(held, policy, name) == []
