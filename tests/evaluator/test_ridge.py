"""Ridge regression towards a prior: its formula, and rows that come in several pieces."""

from __future__ import annotations

import pytest
import torch

from autoprune.evaluator.ridge import ridge_over


def test_ridge_regression_returns_its_prior_where_the_prior_is_right() -> None:
    g = torch.Generator().manual_seed(0)
    u, prior = torch.randn(2, 50, 6, generator=g), torch.randn(2, 3, 6, generator=g)
    weight, shift = ridge_over([(u, u @ prior.transpose(1, 2) + 0.7)], prior, intercept=True)
    torch.testing.assert_close(weight, prior, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shift, torch.full((6,), 0.7), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("columns", [5, 70])
def test_ridge_regression_is_the_minimum_of_its_formula(columns: int) -> None:
    """|t - u W' - b|^2 / n + r |W - prior|^2 with r of a hundredth of the mean diagonal of u'u / n, u centred."""
    g = torch.Generator().manual_seed(1)
    u, t = (torch.randn(1, 40, n, generator=g, dtype=torch.float64) for n in (columns, 3))
    prior = torch.randn(1, 3, columns, generator=g, dtype=torch.float64)
    x, y = (v[0] - v[0].mean(0) for v in (u, t))
    pull = (40 * 1e-2 * (x.T @ x / 40).diagonal().mean()).sqrt() * torch.eye(columns, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([x, pull]), torch.cat([y, pull @ prior[0].T])).solution.T
    shift = t[0].mean(0) - expected @ u[0].mean(0)
    weight, intercept = ridge_over([(u.clone(), t)], prior, intercept=True)
    torch.testing.assert_close(weight[0], expected)
    torch.testing.assert_close(intercept, shift)


@pytest.mark.parametrize("columns", [6, 120])
@pytest.mark.parametrize("intercept", [True, False])
def test_rows_in_several_pieces_are_fitted_as_if_they_were_one(intercept: bool, columns: int) -> None:
    g = torch.Generator().manual_seed(2)
    u, t = (100.0 + torch.randn(2, 90, n, generator=g, dtype=torch.float64) for n in (columns, 4))
    prior = torch.randn(2, 4, columns, generator=g, dtype=torch.float64)
    whole = ridge_over([(u.clone(), t)], prior, intercept)
    pieces = [(u[:, a:b].clone(), t[:, a:b]) for a, b in ((0, 50), (50, 57), (57, 90))]
    for found, expected in zip(ridge_over(pieces, prior, intercept), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_without_an_intercept_fewer_rows_than_columns_give_the_same_minimum() -> None:
    g = torch.Generator().manual_seed(3)
    u, t = (torch.randn(2, 20, n, generator=g, dtype=torch.float64) for n in (30, 4))
    prior = torch.randn(2, 4, 30, generator=g, dtype=torch.float64)
    weight, shift = ridge_over([(u.clone(), t)], prior, intercept=False)
    assert not shift.any()
    for x, y, w, before in zip(u, t, weight, prior, strict=True):
        ridge = 1e-2 * x.square().sum() / 20 / 30
        slope = x.T @ (x @ w.T - y) / 20 + ridge * (w - before).T
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0.0, atol=1e-9)
