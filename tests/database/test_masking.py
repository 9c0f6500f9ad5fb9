"""Masks: how many numbers stay, which ones, that what is left makes up for the rest, that patterns hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoprune.database.masking import Zeros, best, sparse, within
from autoprune.structure import Group
from autoprune.tracing.masks import digest, packed, unpacked

KINDS = {"conv": (12, 8, 3, 3), "linear": (12, 72), "addmm": (72, 12), "transposed": (8, 12, 3, 3)}
OUTPUTS = {"conv": 0, "linear": 0, "addmm": 1, "transposed": 1}


def gram(n: int, seed: int = 0) -> torch.Tensor:
    """Of inputs that depend on each other, with its ridge."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.relu(torch.randn(2000, n, generator=rng) + torch.randn(2000, 6, generator=rng) @ torch.randn(6, n))
    return (x.T @ x / len(x) + 1e-3 * torch.eye(n)).double()


def factor(second: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.arange(len(second)), torch.linalg.cholesky(second, upper=True))]


def error(weight: torch.Tensor, found: torch.Tensor, second: torch.Tensor) -> float:
    lost = (found - weight).double()
    return float(((lost @ second) * lost).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.01, 0.3, 0.85])
def test_as_many_numbers_stay_as_the_width_says_and_the_mask_is_where_they_are(kind: str, density: float) -> None:
    weight = torch.randn(KINDS[kind], generator=torch.Generator().manual_seed(1))
    zeros = Zeros(round(density * weight.numel()), weight.numel())
    found, mask = sparse(weight, kind, factor(gram(72)), zeros)
    assert int(mask.sum()) == zeros.kept
    assert torch.equal(found != 0, mask)
    assert int(best(weight.abs(), zeros, OUTPUTS[kind]).sum()) == zeros.kept


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 400))
def test_of_a_cut_weight_the_same_share_stays(kept: int, width: int, left: int) -> None:
    zeros = Zeros(min(kept, width), width)
    assert abs(zeros.count(left) - zeros.kept * left / width) <= 0.5
    assert zeros.count(width) == zeros.kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_a_pattern_holds_along_the_inputs_at_every_kernel_position(kind: str, pattern: str) -> None:
    weight = torch.randn(KINDS[kind], generator=torch.Generator().manual_seed(2))
    n, m = map(int, pattern.split(":"))
    group = Group("w", "weight", weight.numel(), (), (weight.numel() * n // m, weight.numel()), (), (), ("w",), pattern)
    zeros = Zeros.of(group, group.grid[0])
    for mask in (sparse(weight, kind, factor(gram(72)), zeros)[1], best(weight.abs(), zeros, OUTPUTS[kind])):
        runs = mask.movedim(1 - OUTPUTS[kind], -1).unflatten(-1, (-1, m)).sum(-1)
        assert bool((runs == n).all())


def test_a_run_that_is_cut_short_keeps_up_to_n() -> None:
    mask = best(torch.arange(12.0).view(2, 6), Zeros(6, 12, (2, 4)))
    assert mask.tolist() == [[False, False, True, True, True, True]] * 2


def test_what_is_left_makes_up_for_the_rest_almost_as_well_as_can_be() -> None:
    second, weight = gram(72), torch.randn(12, 72, generator=torch.Generator().manual_seed(3))
    zeros = Zeros(round(0.3 * weight.numel()), weight.numel())
    found, mask = sparse(weight, "linear", factor(second), zeros)
    exact = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        exact[row, kept] = torch.linalg.solve(second[kept][:, kept], second[kept] @ weight[row].double()).float()
    least = error(weight, exact, second)
    assert least <= error(weight, found, second) < 1.05 * least
    by_size = weight * best(weight.abs(), zeros)
    assert error(weight, found, second) < 0.7 * error(weight, by_size, second)


def test_one_masked_number_moves_the_others_as_worked_out_by_hand() -> None:
    """Two inputs with the Gram [[2, 1], [1, 2]]: without the second, the first becomes w1 + w2 / 2."""
    second = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    mask = torch.tensor([[True, False]])
    found = within(mask, torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 1.0]]), second)
    assert torch.allclose(found, torch.tensor([[3.5, 0.0]]))


def test_rows_that_lose_all_and_inputs_that_never_come_stay_finite() -> None:
    second = torch.zeros(4, 4)
    mask = torch.tensor([[False] * 4, [True] * 4])
    found = within(mask, torch.ones(2, 4), torch.ones(2, 4), second)
    assert found.tolist() == [[0.0] * 4, [1.0] * 4]


@given(st.integers(1, 40), st.integers(0, 999))
def test_packed_bits_come_back(count: int, seed: int) -> None:
    mask = torch.rand(3, count, generator=torch.Generator().manual_seed(seed)) > 0.5
    assert torch.equal(unpacked(packed(mask), mask.shape), mask)
    assert len(packed(mask)) == -(-mask.numel() // 8)
    other = mask.clone()
    other[0, 0] = ~other[0, 0]
    assert digest(mask) != digest(other)
