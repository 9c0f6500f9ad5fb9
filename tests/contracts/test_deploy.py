"""The contract of every container: it leaves less or as much, on grids that were there, and says why the rest stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoprune import plugins
from autoprune.allocation.polynomial import macs_polynomial
from autoprune.application.hugging_face import read_back
from autoprune.deploy import check_model, misfits, searched
from autoprune.policy import Policy
from autoprune.space import Space
from autoprune.structure import Structure
from autoprune.tracing.ops import count_macs
from tests.deploy.decoders import INPUTS, analysed, cut, decoder
from tests.synthetic import sparse

KIND = "grouped queries"
each = pytest.mark.parametrize("name", plugins.names("deploy"))


@pytest.fixture(scope="module")
def llama() -> Structure:
    return analysed(KIND)


@each
def test_what_it_holds_is_part_of_what_there_is_and_the_rest_says_why(name: str, llama: Structure) -> None:
    check_model(decoder(KIND), name)
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
def test_it_holds_zeros_or_says_why_not(name: str, llama: Structure) -> None:
    there = {g.name for g in sparse(llama) if g.kind == "weight"}
    held = searched(llama, Space(("kv_group", "neuron", "weight")), name)
    kept = {g.name for g in held if g.kind == "weight"}
    told = there & held.frozen.keys()
    assert kept | told == there
    assert not kept & told


@each
def test_the_dense_model_fits_and_so_does_whatever_its_grids_allow(name: str, llama: Structure) -> None:
    held = searched(llama, Space(), name)
    rng = np.random.default_rng(0)
    bare = Structure(held.groups, ())  # as a policy file knows it
    for structure in (held, bare):
        assert misfits(structure, Policy.dense(held), name) == []
        for _ in range(5):
            policy = Policy.from_array(held, [int(rng.choice(g.grid)) for g in held])
            assert misfits(structure, policy, name) == []


@each
@pytest.mark.filterwarnings("ignore:model.gguf has no vocabulary")
def test_what_its_grids_allow_costs_what_is_counted_and_can_be_written_and_read_back(name: str, tmp_path: Path) -> None:
    container: Any = plugins.load("deploy", name)()
    for seed in (1, 2, 3):
        made = cut(KIND, name, seed)
        cost = macs_polynomial(made.structure)(made.policy.array(made.structure))
        assert int(cost) == count_macs(made.model, INPUTS)
        if hasattr(container, "write"):
            folder = tmp_path / str(seed)
            container.write(made.model, Structure(made.structure.groups, ()), made.policy, folder)
            getattr(container, "read_back", read_back)(folder, made.model, INPUTS)
