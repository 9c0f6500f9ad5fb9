"""A policy for a sibling: the same network gets it back, others get it by stage and depth, at the same cost."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.allocation.budget import reachable
from autoprune.allocation.sibling import Network, Wish, fitted, wishes
from autoprune.costs.macs import Macs
from autoprune.errors import InputError
from autoprune.policy import Policy, canonical
from autoprune.protocols import FloatArray
from autoprune.structure import Group, Slice, Structure
from tests.siblings import network, random_policy, staged
from tests.synthetic import single_steps, sparse

BLOCKS = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
PLANES = st.sampled_from([(4, 8, 16), (8, 16, 32), (6, 12, 12)])


def wish_array(target: Structure, found: dict[str, Wish]) -> FloatArray:
    return np.array([found[g.name].ratio for g in target])


@settings(max_examples=60, deadline=None)
@given(blocks=BLOCKS, planes=PLANES, droppable=st.booleans(), seed=st.integers(0, 10_000))
def test_the_same_network_gets_the_policy_back(
    blocks: tuple[int, ...], planes: tuple[int, ...], droppable: bool, seed: int
) -> None:
    structure = staged(blocks, planes, droppable)
    policy = random_policy(structure, seed)
    found = wishes(network(structure), policy, network(structure))
    wide = np.array([g.width for g in structure])
    widths = canonical(structure, np.round(wish_array(structure, found) * wide).astype(np.int64))
    assert Policy.from_array(structure, widths) == policy
    outside = [g for g in structure if found[g.name].way == "direct"]
    hidden = {i for block, held in structure.inside if not policy.array(structure)[block] for i in held}
    assert {g.name for g in structure} - {g.name for g in outside} <= {structure.groups[i].name for i in hidden}
    macs = {"macs": Macs(structure)}
    own = float(macs["macs"](policy.array(structure)))
    if any(width for name, width in policy.widths if structure.group(name).kind == "block") or not droppable:
        assert fitted(structure, macs, wish_array(structure, found), {"macs": own}) == policy


@settings(max_examples=60, deadline=None)
@given(
    blocks=BLOCKS,
    others=BLOCKS,
    planes=PLANES,
    wider=PLANES,
    droppable=st.booleans(),
    seed=st.integers(0, 10_000),
    place=st.floats(0.05, 1),
)
def test_a_sibling_reaches_the_cost_to_the_cell_and_costs_rise_with_it(
    blocks: tuple[int, ...],
    others: tuple[int, ...],
    planes: tuple[int, ...],
    wider: tuple[int, ...],
    droppable: bool,
    seed: int,
    place: float,
) -> None:
    source, target = staged(blocks, planes, droppable), staged(others, wider, droppable)
    policy = random_policy(source, seed)
    found = wishes(network(source), policy, network(target))
    assert set(found) == set(target.names)
    assert all(0.0 <= w.ratio <= 1.0 for w in found.values())
    cost = Macs(target)
    low, high = reachable(target, cost)
    if droppable:  # of blocks one stays
        low = min(float(cost(Policy.of(alone).array(target))) for alone in _single_blocks(target))
    reached = []
    largest = 1.0 - min(float(cost(narrower.array(target))) for narrower in _a_cell_narrower(target))
    for limit in (low + place / 2 * (high - low), low + place * (high - low), high):
        fit = fitted(target, {"macs": cost}, wish_array(target, found), {"macs": limit})
        fit.check(target)
        reached.append(float(cost(fit.array(target))))
        assert reached[-1] <= limit + 1e-12
        assert all(
            float(cost(wide.array(target))) > limit for wide in single_steps(target, fit) if _is_free(target, wide)
        )
        present = [fit.as_dict()[g.name] for g in target if g.kind == "block"]
        assert not present or any(present)
    assert reached[-1] == pytest.approx(1.0)
    assert all(more > less - largest for less, more in pairwise(reached))


def _a_cell_narrower(structure: Structure) -> list[Policy]:
    """The dense policy with one group a cell narrower each: no cell costs more than there."""
    dense = Policy.dense(structure).as_dict()
    return [Policy.of({**dense, g.name: g.grid[-2]}) for g in structure]


def _is_free(structure: Structure, policy: Policy) -> bool:
    """Whether a policy is in its one form: what is wider inside of an absent block is no step."""
    return Policy.from_array(structure, policy.array(structure)) == policy


def _single_blocks(structure: Structure) -> list[dict[str, int]]:
    """The narrowest policies with one block each."""
    blocks = [g.name for g in structure if g.kind == "block"]
    found = []
    for kept in blocks:
        widths = [int(g.name == kept) if g.kind == "block" else g.grid[0] for g in structure]
        found.append(Policy.from_array(structure, widths).as_dict())
    return found


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 6), more=st.integers(1, 9), seed=st.integers(0, 10_000))
def test_depth_is_interpolated_between_neighbours(n: int, more: int, seed: int) -> None:
    source, target = staged((n,), (32,)), staged((more,), (48,))
    policy = random_policy(source, seed)
    found = wishes(network(source), policy, network(target))
    ratios = [policy.as_dict()[g.name] / g.width for g in source]
    got = [found[g.name].ratio for g in target]
    wanted = np.interp(*([i / (k - 1) for i in range(k)] if k > 1 else [0.5] for k in (more, n)), ratios)
    assert got == pytest.approx(wanted)
    if n > 1 and more > 1:
        assert (got[0], got[-1]) == (ratios[0], ratios[-1])
        assert found[target.names[0]].way == "direct"
    ways = {w.way for w in found.values()}
    assert ways <= {"direct", "interpolated"}


def test_blocks_go_by_relative_depth_and_one_stays_where_one_stayed() -> None:
    source = staged((4,), (16,), droppable=True)
    first_half = Policy.from_array(source, [0, 16, 0, 16, 1, 8, 1, 8])
    found = wishes(network(source), first_half, network(staged((8,), (16,), droppable=True)))
    assert [found[f"layer1.{i}"].ratio >= 0.5 for i in range(8)] == [False] * 4 + [True] * 4
    assert {found[f"layer1.{i}.conv1"].ratio for i in range(8)} == {0.5}, "of what is absent nothing is known"
    second = Policy.from_array(source, [0, 16, 1, 8, 0, 16, 0, 16])
    found = wishes(network(source), second, network(staged((2,), (16,), droppable=True)))
    assert [found[f"layer1.{i}"].ratio >= 0.5 for i in range(2)] == [True, False]


def test_blocks_go_too_where_the_narrowest_widths_do_not_fit() -> None:
    target = staged((4, 4), (8, 8), droppable=True)
    blocks = [g.name for g in target if g.kind == "block"]
    floored = tuple(g if g.kind == "block" else replace(g, grid=(7, 8)) for g in target)
    target = Structure(floored, target.ops)
    wish = np.array([0.9 - 0.1 * blocks.index(g.name) / 8 if g.kind == "block" else 0.5 for g in target])
    cost = Macs(target)
    fit = fitted(target, {"macs": cost}, wish, {"macs": 0.5})
    assert [fit.as_dict()[name] for name in blocks] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert float(cost(fit.array(target))) <= 0.5
    with pytest.raises(InputError, match="out of reach while one of 8 blocks stays"):
        fitted(target, {"macs": cost}, wish, {"macs": 0.05})


def test_what_the_policy_left_dense_stays_dense_and_what_it_does_not_know_gets_the_mean_of_the_nearest() -> None:
    source, target = staged((2, 2), (8, 16)), staged((3, 3), (8, 16))
    policy = Policy.of({"layer1.0.conv1": 4, "layer1.1.conv1": 4, "layer2.0.conv1": 4, "layer2.1.conv1": 8})
    shapes = dict(network(target).shapes)
    stream = tuple(
        Group(f"layer{s}.0.conv2", "channel", 8 * s, (Slice(f"layer{s}.0.conv2.weight", 0, "produce"),), (1, 8 * s))
        for s in (1, 2)
    )
    third = Group("layer2.0.conv3", "channel", 4, (Slice("layer2.0.conv3.weight", 0, "produce"),), (1, 2, 4))
    other = Group("heads", "head", 4, (Slice("heads.weight", 0, "produce"),), (1, 2, 4))
    wide = Network((*target.groups, *stream, third, other), {**shapes, "layer2.0.conv3.weight": (4, 16, 3, 3)})
    found = wishes(network(source), policy, wide)
    assert not {g.name for g in (*stream, other)} & set(found)
    assert found["layer2.0.conv3"] == Wish(pytest.approx(0.375), "mean", 1 / 16)
    silent = Network(source.groups, {})
    assert "layer2.0.conv3" not in wishes(silent, policy, wide), "a file of 0.1.0 does not say what it left dense"


def test_stages_without_names_are_runs_of_one_width() -> None:
    def vgg(*widths: int) -> Network:
        slices = [(Slice(f"features.{3 * i}.weight", 0, "produce"),) for i in range(len(widths))]
        groups = [
            Group(f"features.{3 * i}", "channel", w, slices[i], tuple(range(1, w + 1))) for i, w in enumerate(widths)
        ]
        return Network(tuple(groups), {s[0].tensor: (w, 3, 3, 3) for s, w in zip(slices, widths, strict=True)})

    source = vgg(8, 16, 16)
    policy = Policy.of({"features.0": 2, "features.3": 8, "features.6": 16})
    found = wishes(source, policy, vgg(8, 8, 16, 16, 16))
    assert [w.ratio for w in found.values()] == [0.25, 0.25, 0.5, 0.75, 1.0]
    other = wishes(source, policy, vgg(8, 16, 32, 64))  # as many stages as the policy has not: depth in the whole
    assert [w.ratio for w in other.values()] == pytest.approx([0.25, 5 / 12, 2 / 3, 1.0])


def test_a_wrapped_network_and_tied_layers_are_known_again() -> None:
    source, target = staged((2, 2), (8, 16)), staged((3, 3), (8, 16), before="backbone.")
    policy = random_policy(source, 1)
    inner = wishes(network(source), policy, network(staged((3, 3), (8, 16))))
    found = wishes(network(source), policy, network(target))
    assert {f"backbone.{name}": wish for name, wish in inner.items()} == found
    tied = replace(source.groups[0], name="layer1.*.conv1")
    for depth in (2, 3):
        found = wishes(
            Network((tied,), network(source).shapes), Policy.of({tied.name: 4}), network(staged((depth, 1), (8, 16)))
        )
        assert [w.ratio for w in found.values()] == [0.5] * depth, "all layers of the tied stage, and no other"


def test_strangers_are_told_in_one_line_what_each_has() -> None:
    source = staged((1, 1), (8, 16))
    encoder = Group("encoder.layer.0.mlp", "neuron", 8, (Slice("encoder.layer.0.mlp.weight", 0, "produce"),), (4, 8))
    stranger = Network((encoder,), {"encoder.layer.0.mlp.weight": (8, 8)})
    with pytest.raises(
        InputError, match=r"has 2 channels \(layer1.0.conv1, layer2.0.conv1\), the model 1 neuron \(enc"
    ):
        wishes(network(source), Policy.dense(source), stranger)
    named_otherwise = replace(encoder, kind="channel")
    with pytest.raises(InputError, match="none of them correspond"):
        wishes(network(source), Policy.dense(source), replace(stranger, groups=(named_otherwise,)))


def test_densities_are_carried_over_by_depth_and_a_matrix_that_was_left_dense_stays_so() -> None:
    source, target = (sparse(staged(blocks, (8, 8, 8))) for blocks in ((1, 2, 1), (1, 3, 1)))
    dense = "layer3.0.conv2.weight"
    searched = Structure(tuple(g for g in source if g.name not in (dense, "linear.weight")), source.ops)
    widths = {g.name: g.width for g in searched}
    named = {f"layer2.{i}.conv1.weight": i for i in range(2)}
    few = {name: searched.group(name).grid[4 + 4 * i] for name, i in named.items()}  # densities .15 and .5 or so
    theirs = Network(searched.groups, network(source).shapes)
    found = wishes(theirs, Policy.of({**widths, **few}), network(target))
    assert dense not in found
    first, last = (few[name] / searched.group(name).width for name in named)
    ratios = [found[f"layer2.{i}.conv1.weight"].ratio for i in range(3)]
    assert ratios == pytest.approx([first, (first + last) / 2, last])
