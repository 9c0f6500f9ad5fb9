"""Costs that see zeros are what a slow count of every matrix gives, over widths, blocks, bits and patterns."""

from __future__ import annotations

from fractions import Fraction
from math import prod

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autoprune.allocation.knapsack import Allocator
from autoprune.costs import build_cost
from autoprune.costs.bytes import Bytes
from autoprune.costs.effective_macs import EffectiveMacs
from autoprune.costs.macs import Macs
from autoprune.costs.nonzeros import Nonzeros
from autoprune.costs.params import Params
from autoprune.errors import InputError
from autoprune.matrices import LEAST_SIDE, weights_of, with_precisions
from autoprune.policy import Policy
from autoprune.structure import Op, Structure, TensorSpec
from tests.allocation.test_polynomial import literal_shapes
from tests.synthetic import chain, sparse, with_blocks

EXACT = 1e-13


def counted(structure: Structure, policy: Policy) -> dict[str, float]:
    """Nonzeros, MACs with them and bytes of a policy, tensor by tensor in fractions."""
    widths = policy.as_dict()
    absent = {s.tensor for g in structure if g.kind == "block" and not widths[g.name] for s in g.slices}
    narrow = Structure(tuple(g for g in structure if g.narrows), structure.ops)
    shapes = literal_shapes(narrow, Policy.of({g.name: widths[g.name] for g in narrow}))
    numbers = {name: 0 if name in absent else prod(shape) for name, shape in shapes.items()}
    density = {g.matrices[0]: Fraction(widths[g.name], g.width) for g in structure if g.kind == "weight"}
    bits = {name: widths[g.name] for g in structure if g.kind == "bits" for name in g.matrices}
    stay = {name: n * density.get(name, Fraction(1)) for name, n in numbers.items()}
    macs = sum(op.positions * (stay[op.weight] if op.weight else 1) for op in structure.ops)
    taken = Fraction(0)
    for op in structure.ops:
        for spec in op.tensors:
            each = bits.get(spec.name, 8 * spec.itemsize)
            scales = 4 * shapes[spec.name][op.outputs] if each == 8 and spec.name not in absent else 0
            forms = [Fraction(numbers[spec.name] * each, 8) + scales]
            if spec.name in density:
                whole, mask = 8 * spec.itemsize, Fraction(numbers[spec.name], 8)
                forms += [mask + stay[spec.name] * each / 8 + scales, mask + stay[spec.name] * whole / 8]
                forms.append(Fraction(numbers[spec.name] * whole, 8))
            taken += min(forms)
    found = sum(stay[spec.name] for _, spec in weights_of(structure))
    return {"nonzeros": float(found), "effective_macs": float(macs), "bytes": float(taken)}


@settings(max_examples=60, deadline=None)
@given(
    n_groups=st.integers(4, 9),
    seed=st.integers(0, 1000),
    pattern=st.sampled_from(["", "2:4", "4:8"]),
    more=st.sampled_from(["", "blocks", "bits"]),
    alone=st.booleans(),
)
def test_costs_are_what_counting_gives(n_groups: int, seed: int, pattern: str, more: str, alone: bool) -> None:
    plain = with_blocks(chain(n_groups, seed)) if more == "blocks" else chain(n_groups, seed)
    of = int(pattern[2:] or 1)
    assume(any(spec.shape[1] % of == 0 for _, spec in weights_of(plain)))
    structure = sparse(plain, pattern, alone and more != "blocks")
    assume(more != "bits" or any(min(s.shape[0], prod(s.shape[1:])) >= LEAST_SIDE for _, s in weights_of(structure)))
    structure = with_precisions(structure, (32, 8)) if more == "bits" else structure
    rng = np.random.default_rng(seed)
    policies = [Policy.from_array(structure, [rng.choice(g.grid) for g in structure]) for _ in range(4)]
    widths = np.stack([p.array(structure) for p in policies])
    dense = counted(structure, Policy.dense(structure))
    for name, cost in (
        ("nonzeros", Nonzeros(structure)),
        ("effective_macs", EffectiveMacs(structure)),
        ("bytes", Bytes(structure)),
    ):
        assert cost.dense == dense[name]
        assert (cost(widths) * cost.dense).tolist() == pytest.approx([counted(structure, p)[name] for p in policies])
        assert cost(widths).tolist() == [float(cost(w)) for w in widths]


def test_macs_and_parameters_do_not_see_zeros() -> None:
    structure, plain = sparse(chain(4)), chain(4)
    rng = np.random.default_rng(0)
    widths = np.array([[rng.choice(g.grid) for g in structure] for _ in range(8)])
    for cost in (Macs, Params):
        assert cost(structure)(widths).tolist() == cost(plain)(widths[:, : len(plain)]).tolist()


@pytest.mark.parametrize("name", ["nonzeros", "effective_macs", "bytes"])
def test_a_cost_of_zeros_falls_with_every_group_and_passes_the_trial_of_costs(name: str) -> None:
    structure = with_precisions(sparse(with_blocks(chain(5))), (32, 8))
    cost = build_cost(name, structure)
    rng = np.random.default_rng(1)
    for _ in range(5):
        widths = np.array([rng.choice(g.grid) for g in structure])
        for i, group in enumerate(structure):
            line = np.repeat(widths[None], len(group.grid), axis=0)
            line[:, i] = group.grid
            assert np.all(np.diff(cost(line)) >= -EXACT)


def test_without_groups_of_weights_effective_macs_are_macs_and_nonzeros_follow_the_cuts() -> None:
    structure = chain(6)
    widths = np.array([[g.grid[len(g.grid) // 2] for g in structure], [g.grid[0] for g in structure]])
    assert EffectiveMacs(structure)(widths).tolist() == Macs(structure)(widths).tolist()
    assert Nonzeros(structure)(widths)[1] < Nonzeros(structure)(widths)[0] < 1


def test_a_mask_costs_a_bit_a_number_and_a_full_matrix_none() -> None:
    spec = TensorSpec("a.weight", (64, 64), 4)
    structure = sparse(Structure((), (Op("a", "Linear", 0, 1, spec.name, tensors=(spec,)),)))
    found = Bytes(structure)(np.array([[409], [2048], [4096]])) * Bytes(structure).dense
    assert found.tolist() == [512 + 409 * 4, 512 + 2048 * 4, 4096 * 4]


def test_a_model_without_matrices_says_so() -> None:
    spec = TensorSpec("n.weight", (8,), 4)
    structure = Structure((), (Op("n", "BatchNorm2d", 0, tensors=(spec,)),))
    for name in ("nonzeros", "effective_macs"):
        with pytest.raises(InputError, match=f"cost '{name}' cannot be used on this model"):
            build_cost(name, structure)


def test_a_knapsack_over_the_zeros_alone_is_exact() -> None:
    """Nonzeros add up over the matrices, so a dynamic programme finds the least penalty there is."""
    structure = sparse(chain(3), alone=True)
    small = Structure(structure.groups[:3], structure.ops)
    cost = Nonzeros(small)
    penalties = [np.array([1.0 / (j + 1) - 1.0 / len(g.grid) for j in range(len(g.grid))]) for g in small]
    found = Allocator(small, {"nonzeros": cost}).solve(penalties, {"nonzeros": 0.6})
    grids = np.stack(np.meshgrid(*(np.arange(len(g.grid)) for g in small), indexing="ij"), axis=-1).reshape(-1, 3)
    widths = np.stack([np.array(g.grid)[grids[:, i]] for i, g in enumerate(small)], axis=-1)
    lost = np.sum([p[grids[:, i]] for i, p in enumerate(penalties)], axis=0)
    best = lost[cost(widths) <= 0.6 + 1e-12].min()
    assert sum(float(p[i]) for p, i in zip(penalties, found, strict=True)) == pytest.approx(float(best))
