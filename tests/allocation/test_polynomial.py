"""The cost polynomial counts what a slow, literal reading of the slices counts."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.allocation.polynomial import macs_polynomial, numel_polynomial
from autoprune.costs.bytes import Bytes
from autoprune.costs.macs import Macs
from autoprune.costs.params import Params
from autoprune.errors import InputError
from autoprune.policy import Policy
from autoprune.structure import Group, Op, Slice, Structure, TensorSpec
from tests.synthetic import chain


def literal_shapes(structure: Structure, policy: Policy) -> dict[str, list[int]]:
    """Shapes after the atoms beyond each width went, position by position."""
    gone: dict[tuple[str, int], set[int]] = {}
    for group in structure.groups:
        for piece in group.slices:
            for atom in range(policy.as_dict()[group.name], group.width):
                gone.setdefault((piece.tensor, piece.dim), set()).update(piece.positions(atom))
    specs = [spec for op in structure.ops for spec in op.tensors]
    return {s.name: [n - len(gone.get((s.name, dim), ())) for dim, n in enumerate(s.shape)] for s in specs}


@settings(max_examples=60, deadline=None)
@given(n_groups=st.integers(1, 14), seed=st.integers(0, 1000))
def test_the_polynomial_equals_counting_position_by_position(n_groups: int, seed: int) -> None:
    structure = chain(n_groups, seed)
    rng = np.random.default_rng(seed)
    policy = Policy.from_array(structure, [rng.choice(g.grid) for g in structure.groups])
    shapes, widths = literal_shapes(structure, policy), policy.array(structure)
    macs = sum(op.positions * (prod(shapes[op.weight]) if op.weight else 1) for op in structure.ops)
    specs = [spec for op in structure.ops for spec in op.tensors]
    assert macs_polynomial(structure)(widths) == macs
    assert numel_polynomial(structure, lambda s: int(s.is_parameter))(widths) == sum(
        prod(shapes[s.name]) for s in specs if s.is_parameter
    )
    n_bytes = sum(prod(shapes[s.name]) * s.itemsize for s in specs)
    assert float(Bytes(structure)(widths)) * Bytes(structure).dense == pytest.approx(n_bytes, rel=1e-12)


def test_concatenated_flattened_and_tied_tensors_are_counted() -> None:
    weights = (TensorSpec("a.weight", (4, 3, 1, 1), 4), TensorSpec("b.weight", (6, 3, 1, 1), 4))
    joint = TensorSpec("joint.weight", (5, 10 * 9), 4)  # reads both, flattened from 3x3 pixels
    ops = (
        Op("a", "Conv2d", 0, 9, "a.weight", tensors=(weights[0],)),
        Op("b", "Conv2d", 0, 9, "b.weight", tensors=(weights[1],)),
        Op("joint", "Linear", 1, 1, "joint.weight", tensors=(joint,)),
        Op("tied", "Linear", 2, 2, "joint.weight"),  # uses the weight that `joint` owns
    )
    first = (Slice("a.weight", 0, "produce"), Slice("joint.weight", 1, "consume", stride=9, repeat=9))
    second = (Slice("b.weight", 0, "produce"), Slice("joint.weight", 1, "consume", offset=36, stride=9, repeat=9))
    a, b = Group("a", "channel", 4, first, (1, 2, 3, 4)), Group("b", "channel", 6, second, (2, 4, 6))
    structure = Structure((a, b), ops)
    widths = np.array([3, 4])
    assert macs_polynomial(structure)(widths) == 9 * 3 * 3 + 9 * 4 * 3 + (1 + 2) * 5 * (3 + 4) * 9
    assert numel_polynomial(structure, lambda s: 1)(widths) == 3 * 3 + 4 * 3 + 5 * 7 * 9


def test_equal_input_and_output_groups_make_a_square() -> None:
    spec = TensorSpec("loop.weight", (8, 8, 3, 3), 4)
    slices = (Slice("loop.weight", 0, "produce"), Slice("loop.weight", 1, "consume"))
    structure = Structure(
        (Group("loop", "channel", 8, slices, (2, 8)),), (Op("loop", "Conv2d", 0, 16, spec.name, tensors=(spec,)),)
    )
    assert macs_polynomial(structure)(np.array([[2], [8]])).tolist() == [16 * 9 * 4.0, 16 * 9 * 64.0]


def test_a_slice_that_the_width_cannot_tell_is_refused() -> None:
    spec = TensorSpec("w", (8, 8), 4)
    group = Group("w", "channel", 8, (Slice("w", 0, "produce", first=2, count=4),), (4, 8))
    with pytest.raises(InputError, match="does not say how 'w' shrinks"):
        Macs(Structure((group,), (Op("w", "Linear", 0, 1, "w", tensors=(spec,)),)))


def test_a_model_without_anything_to_count_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no parameters"):
        Params(Structure((), (Op("relu", "ReLU", 0),)))
