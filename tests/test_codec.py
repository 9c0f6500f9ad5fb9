"""Widths, positions and ratios translate into each other without loss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.codec import Codec
from autoprune.errors import InputError
from autoprune.policy import Policy
from tests.synthetic import chain


@settings(max_examples=50, deadline=None)
@given(n_groups=st.integers(1, 30), seed=st.integers(0, 1000), grid_step=st.sampled_from([1, 2, 3]))
def test_every_width_on_the_grid_survives_the_unit_cube(n_groups: int, seed: int, grid_step: int) -> None:
    codec = Codec(chain(n_groups, seed, grid_step))
    positions = np.random.default_rng(seed).integers(0, codec.last + 1)
    policy = codec.policy(positions)
    assert np.array_equal(codec.floor(codec.encode(policy)), positions)
    assert np.array_equal(codec.positions(policy.array(codec.structure)), positions)


def test_a_ratio_between_widths_is_rounded_down_and_clamped_to_the_grid() -> None:
    structure = chain(2, grid_step=4)
    codec = Codec(structure)
    just_below_full = codec.widths(codec.floor(np.full((3, 2), 0.999)))
    assert just_below_full.tolist() == [[g.grid[-2] for g in structure.groups]] * 3
    assert codec.widths(codec.floor([-5.0, 0.0])).tolist() == [g.grid[0] for g in structure.groups]
    assert codec.policy(codec.floor([7.0, 1.0])) == Policy.dense(structure)


def test_a_width_off_the_grid_is_named() -> None:
    structure = chain(2, grid_step=4)
    with pytest.raises(InputError, match=r"group 'layer0' cannot be 5 wide; its grid is"):
        Codec(structure).positions(np.array([5, structure.groups[1].width]))
