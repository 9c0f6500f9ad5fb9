"""What each closed-form strategy is: its formula against the paper's, and its optimum against policies nearby."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autoprune.allocation.budget import normalised, project
from autoprune.allocation.knapsack import penalties, predicted_loss
from autoprune.codec import Codec
from autoprune.errors import InputError
from autoprune.policy import Policy
from autoprune.protocols import FloatArray, Problem, Strategy
from autoprune.strategies.erk import erk, erk_densities
from autoprune.strategies.fastnas import fastnas
from autoprune.strategies.global_ import global_
from autoprune.strategies.knapsack import knapsack
from autoprune.strategies.lamp import lamp, lamp_scores
from autoprune.strategies.owl import owl, owl_ratios
from autoprune.strategies.uniform import uniform
from autoprune.structure import Slice, Structure
from tests.synthetic import chain, make_problem, single_steps, with_blocks

STRUCTURE = chain()
BUDGETS = (0.7, 0.5, 0.3)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(STRUCTURE)


def drops(problem: Problem, policy: Policy) -> FloatArray:
    """Each group's predicted loss increase."""
    positions = Codec(STRUCTURE).positions(policy.array(STRUCTURE))
    return np.array([p[i] for p, i in zip(penalties(problem), positions, strict=True)])


def test_erk_densities_are_the_papers_averaged_over_the_weights_that_a_group_scales() -> None:
    first, second = STRUCTURE.groups[0].width, STRUCTURE.groups[1].width
    third = STRUCTURE.groups[2].width
    own = (first + 3 + 3 + 3) / (first * 3 * 3 * 3)
    reader = (first + second + 3 + 3) / (first * second * 3 * 3)
    shortcut = (first + third + 1 + 1) / (first * third)
    assert erk_densities(STRUCTURE)[0] == pytest.approx((own + reader + shortcut) / 3)


def test_erk_widths_follow_its_densities_where_none_is_cut_off(problem: Problem) -> None:
    ratios = Codec(STRUCTURE).encode(erk(problem, 0.5))
    densities = erk_densities(STRUCTURE)
    free = ratios < 1
    scale = np.median(ratios[free] / densities[free])
    cell = 1 / Codec(STRUCTURE).dense
    assert np.all(np.abs(ratios - np.minimum(1, scale * densities)) <= 2 * cell + 0.05)
    assert not free.all()


def test_a_group_that_scales_no_weight_is_no_trouble_for_erk(problem: Problem) -> None:
    bare = replace(STRUCTURE.groups[4], slices=(Slice("layer4.norm.weight", 0, "carry"),))
    structure = Structure((*STRUCTURE.groups[:4], bare, *STRUCTURE.groups[5:]), STRUCTURE.ops, {})
    assert erk_densities(structure)[4] == 1.0


def test_lamp_scores_are_the_papers() -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=20) ** 2
    order = np.sort(weights)
    expected = [w**2 / sum(v**2 for v in order[i:]) for i, w in enumerate(order)]
    assert np.allclose(lamp_scores(weights), expected)
    assert np.all(np.diff(lamp_scores(weights)) >= 0)
    assert lamp_scores(np.zeros(3)).tolist() == [1.0, 1.0, 1.0]
    assert np.isfinite(lamp_scores(np.array([1e-200, 1e200, -1.0]))).all()


def test_lamp_keeps_the_atoms_whose_lamp_score_is_highest(problem: Problem) -> None:
    widths = lamp(problem, 0.5).as_dict()
    kept: list[float] = []
    dropped: list[float] = []
    for group in STRUCTURE.groups:
        scores = lamp_scores(problem.scores[group.name]).tolist()
        n_dropped = group.width - widths[group.name]
        dropped += scores[:n_dropped]
        kept += scores[n_dropped:]
    given_back = sum(score < max(dropped) for score in kept)  # the last of the budget goes by gain, not by threshold
    assert given_back <= 0.1 * len(kept)


def test_lamp_and_global_ask_only_for_the_order_within_a_group(problem: Problem) -> None:
    shuffled = {n: np.random.default_rng(2).permutation(s) for n, s in problem.scores.items()}
    for strategy in (lamp, global_):
        assert strategy(replace(problem, scores=shuffled), 0.5) == strategy(problem, 0.5)


def with_outliers(problem: Problem, counts: dict[str, int], height: float) -> Problem:
    """Every atom scores 1, but for so many of the groups in `counts`, which score `height`."""
    scores = {g.name: np.ones(g.width) for g in STRUCTURE.groups}
    for name, count in counts.items():
        scores[name][:count] = height
    return replace(problem, scores=scores)


def test_owl_ratios_are_linear_in_the_shares_of_outliers_and_lie_within_lambda_of_their_middle() -> None:
    assert owl_ratios(np.array([0.02, 0.1, 0.04])) == pytest.approx([0.0, 0.16, 0.04])
    assert owl_ratios(np.array([0.1, 0.1])).tolist() == [0.0, 0.0]


def test_an_outlier_counts_for_more_in_a_narrow_group_under_owl(problem: Problem) -> None:
    widths = [g.width for g in STRUCTURE.groups]
    narrow, wide = widths.index(16), widths.index(32)
    raw = np.zeros(len(widths))
    raw[narrow], raw[wide] = 0.16, 0.08  # shares 1/16 and 1/32, the others none
    counts = {STRUCTURE.groups[narrow].name: 1, STRUCTURE.groups[wide].name: 1}
    expected = project(STRUCTURE, problem.costs, raw, {"macs": 0.5})
    assert owl(with_outliers(problem, counts, 1000.0), 0.5) == expected


def test_one_atom_above_five_times_the_mean_widens_its_group_under_owl_and_one_below_does_not(problem: Problem) -> None:
    (name, *_) = [g.name for g in STRUCTURE.groups if g.width == 16]
    same = uniform(problem, 0.5)  # 15 ones and h: h is above 5 * (15 + h) / 16 from 75 / 11 = 6.818 on
    assert owl(with_outliers(problem, {name: 1}, 6.81), 0.5) == same
    before, after = same.as_dict(), owl(with_outliers(problem, {name: 1}, 6.83), 0.5).as_dict()
    assert after.pop(name) > before.pop(name)
    assert all(after[other] <= before[other] for other in before)
    assert after != before


@pytest.mark.parametrize("target", BUDGETS)
def test_owl_meets_all_limits_to_the_cell_where_it_is_not_uniform(problem: Problem, target: float) -> None:
    counts = {g.name: i % 4 for i, g in enumerate(STRUCTURE.groups) if g.width >= 24}
    limits = {"macs": target, "params": 0.6}
    bound = replace(problem, budget=replace(problem.budget, limits=limits))
    outlying = with_outliers(bound, counts, 1000.0)
    policy = owl(outlying, target)
    assert policy != uniform(outlying, target)
    assert all(problem.costs[c](policy.array(STRUCTURE)) <= limit for c, limit in limits.items())
    for wider in single_steps(STRUCTURE, policy):
        assert any(problem.costs[c](wider.array(STRUCTURE)) > limit for c, limit in limits.items())


@pytest.mark.parametrize("target", BUDGETS)
def test_no_other_strategy_has_a_smaller_largest_drop_than_fastnas(problem: Problem, target: float) -> None:
    largest = drops(problem, fastnas(problem, target)).max()
    others = (knapsack, uniform, global_, erk, lamp, owl)
    assert all(largest <= drops(problem, other(problem, target)).max() + 1e-12 for other in others)


@pytest.mark.parametrize("target", BUDGETS)
def test_no_other_strategy_has_a_smaller_sum_of_drops_than_the_knapsack(problem: Problem, target: float) -> None:
    total = drops(problem, knapsack(problem, target)).sum()
    others = (fastnas, uniform, global_, erk, lamp, owl)
    assert all(total <= drops(problem, other(problem, target)).sum() for other in others)


def test_no_exchange_of_two_cells_improves_the_knapsack(problem: Problem) -> None:
    policy, codec, prices = knapsack(problem, 0.5), Codec(STRUCTURE), penalties(problem)
    best = float(predicted_loss(prices, codec.positions(policy.array(STRUCTURE))))
    for i, narrowed in enumerate(codec.positions(policy.array(STRUCTURE))):
        if not narrowed:
            continue
        positions = codec.positions(policy.array(STRUCTURE))
        positions[i] -= 1
        for wider in single_steps(STRUCTURE, codec.policy(positions)):
            if problem.costs["macs"](wider.array(STRUCTURE)) <= 0.5:
                assert predicted_loss(prices, codec.positions(wider.array(STRUCTURE))) >= best - 1e-12


@pytest.mark.parametrize(("name", "strategy"), [("knapsack", knapsack), ("fastnas", fastnas)])
def test_a_strategy_without_its_table_says_what_to_set(problem: Problem, name: str, strategy: Strategy) -> None:
    message = rf"strategy {name} needs the sensitivity table: set evaluator\.sensitivity to 2 or more"
    with pytest.raises(InputError, match=message):
        strategy(replace(problem, table=None), 0.5)


def test_uniform_keeps_the_same_share_of_blocks_and_of_atoms() -> None:
    problem = make_problem(with_blocks(chain(6)))
    for target in (0.9, 0.6, 0.3):
        policy = uniform(problem, target)
        assert float(problem.costs["macs"](policy.array(problem.structure))) <= target
    widths = uniform(problem, 0.3).as_dict()
    assert sorted(widths[name] for name in ("block1", "block3")) == [0, 1], "one of the two"
    assert set(uniform(problem, 1.0).as_dict().items()) == set(Policy.dense(problem.structure).widths)


def test_one_threshold_takes_all_blocks_for_one_group() -> None:
    structure = with_blocks(chain(6))
    scores = normalised(structure, {g.name: np.full(g.width, 7.0 if g.name == "block1" else 1.0) for g in structure})
    assert (scores["block1"].tolist(), scores["block3"].tolist()) == ([1.75], [0.25])
    assert scores["layer0"].tolist() == [1.0] * structure.group("layer0").width
