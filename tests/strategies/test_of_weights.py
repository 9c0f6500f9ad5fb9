"""Closed forms over single weights: what the papers, and torch's own pruning, give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from autoprune.allocation.budget import Projector, normalised
from autoprune.costs.nonzeros import Nonzeros
from autoprune.families import analyze
from autoprune.matrices import with_weights
from autoprune.policy import Policy
from autoprune.protocols import Budget, FloatArray, Problem
from autoprune.strategies.erk import erk, erk_densities
from autoprune.strategies.global_ import global_
from autoprune.strategies.lamp import lamp
from autoprune.strategies.owl import owl
from autoprune.strategies.uniform import uniform
from autoprune.structure import Structure


class Net(nn.Module):
    """Three matrices of very different magnitudes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem = nn.Conv2d(2, 8, 3, padding=1)
            self.wide = nn.Conv2d(8, 16, 3, padding=1)
            self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.wide(self.stem(x).relu()).relu().mean((2, 3)))
        return out


STRUCTURE = with_weights(Structure((), analyze(Net(), (torch.zeros(2, 2, 8, 8),)).ops))
MAGNITUDES = {
    f"{name}.weight": m.weight.detach().abs().flatten().numpy()
    for name, m in Net().named_modules()
    if isinstance(m, nn.Conv2d | nn.Linear)
}


def problem_of(structure: Structure, scores: dict[str, FloatArray] | None = None) -> Problem:
    given = MAGNITUDES if scores is None else scores
    return Problem(structure, given, {"nonzeros": Nonzeros(structure)}, Budget("nonzeros", 0.05, 0.9, (0.3,), {}))


def any_width(structure: Structure) -> Structure:
    """Every number of weights is allowed."""
    groups = [replace(g, grid=tuple(range(1, g.width + 1))) for g in structure]
    return Structure(tuple(groups), structure.ops)


def torchs(density: float) -> dict[str, int]:
    """How many weights of each matrix torch's own global pruning by magnitude leaves."""
    net = Net()
    modules = {n: m for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    total = sum(m.weight.numel() for m in modules.values())
    amount = total - int(density * total)
    prune.global_unstructured(
        [(m, "weight") for m in modules.values()], pruning_method=prune.L1Unstructured, amount=amount
    )
    return {f"{n}.weight": int(m.weight_mask.sum()) for n, m in modules.items()}


@pytest.mark.parametrize("density", [0.5, 0.3, 0.15])
def test_global_is_torchs_global_pruning_where_every_width_is_allowed(density: float) -> None:
    policy = global_(problem_of(any_width(STRUCTURE)), density)
    assert policy.as_dict() == torchs(density)


@pytest.mark.parametrize("density", [0.5, 0.3, 0.15])
def test_on_the_grids_global_is_a_step_of_the_grid_away_from_it_at_most(density: float) -> None:
    policy, wanted = global_(problem_of(STRUCTURE), density).as_dict(), torchs(density)
    for group in STRUCTURE:
        place = group.grid.index(policy[group.name])
        low, high = group.grid[max(place - 1, 0)], group.grid[min(place + 2, len(group.grid) - 1)]
        assert low <= wanted[group.name] <= high


def test_scores_of_weights_compare_as_they_are_and_keep_their_type() -> None:
    scores = {n: s.astype(np.float32) for n, s in MAGNITUDES.items()}
    found = normalised(STRUCTURE, scores)
    mean = np.mean(np.concatenate([*scores.values()]))
    assert all(v.dtype == np.float32 for v in found.values())
    assert all(np.allclose(found[n] * mean, s, rtol=1e-5) for n, s in scores.items())
    blank = normalised(STRUCTURE, {n: np.zeros_like(s) for n, s in scores.items()})
    assert all(np.all(v == 1.0) for v in blank.values())


def test_lamp_is_one_threshold_over_the_papers_scores() -> None:
    """Worked out weight by weight: w^2 over the sum of all w^2 that are not smaller (Lee et al. 2021)."""
    parts = []
    for i, magnitudes in enumerate(MAGNITUDES.values()):
        squares = np.sort(magnitudes.astype(np.float64) ** 2)
        parts.append([(square / squares[j:].sum(), i) for j, square in enumerate(squares)])
    ranked = sorted((pair for part in parts for pair in part), reverse=True)
    total = sum(m.size for m in MAGNITUDES.values())
    left = np.bincount([i for _, i in ranked[: int(0.3 * total)]], minlength=len(MAGNITUDES))
    policy = lamp(problem_of(any_width(STRUCTURE)), 0.3)
    assert policy.array(STRUCTURE).tolist() == left.tolist()


def test_the_density_of_a_matrix_by_erk_is_that_of_its_own_shape() -> None:
    sums = [(8 + 2 + 3 + 3) / (8 * 2 * 9), (16 + 8 + 3 + 3) / (16 * 8 * 9), (10 + 16) / (10 * 16)]
    assert erk_densities(STRUCTURE).tolist() == pytest.approx(sums)
    policy = erk(problem_of(any_width(STRUCTURE)), 0.3)
    densities = {g.name: policy.as_dict()[g.name] / g.width for g in STRUCTURE}
    scale = densities["wide.weight"] / sums[1]
    assert densities["stem.weight"] == pytest.approx(min(1.0, scale * sums[0]), abs=0.02)
    assert densities["head.weight"] == pytest.approx(min(1.0, scale * sums[2]), abs=0.02)


def test_owl_gives_more_to_the_matrix_with_outliers_over_its_own_mean() -> None:
    rng = np.random.default_rng(0)
    scores = {g.name: np.abs(rng.normal(size=g.width)) for g in STRUCTURE}
    scores["wide.weight"][:60] *= 100
    scores["stem.weight"] *= 1e4  # larger as a whole, and none of them an outlier
    problem = problem_of(any_width(STRUCTURE), scores)
    densities = {g.name: owl(problem, 0.4).as_dict()[g.name] / g.width for g in STRUCTURE}
    assert densities["wide.weight"] == pytest.approx(densities["stem.weight"] + 0.16, abs=0.02)
    assert densities["stem.weight"] == pytest.approx(densities["head.weight"], abs=0.02)


def test_uniform_leaves_the_same_share_of_every_matrix() -> None:
    for density in (0.5, 0.3, 0.15):
        policy = uniform(problem_of(STRUCTURE), density)
        assert policy == Policy.of({g.name: int(density * g.width + 1e-9) for g in STRUCTURE})


def test_what_room_is_left_goes_to_the_step_of_the_largest_scores() -> None:
    """The gain of a step is the sum of the scores that it brings back, as it is for atoms."""
    projector = Projector(STRUCTURE, {"nonzeros": Nonzeros(STRUCTURE)}, MAGNITUDES)
    assert projector._gains is not None
    parts = np.split(projector._gains, np.cumsum([len(g.grid) for g in STRUCTURE])[:-1])
    mean = float(np.mean(np.concatenate([*MAGNITUDES.values()])))
    for group, gains in zip(STRUCTURE, parts, strict=True):
        falling = np.sort(MAGNITUDES[group.name])[::-1].astype(np.float64)
        sums = [falling[a:b].sum() / mean for a, b in zip(group.grid, group.grid[1:], strict=False)]
        assert gains.tolist() == pytest.approx([*sums, 0.0], rel=1e-5)
