"""The repairs: the dense model is their fixed point, and a pruned one gets better."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoprune import plugins
from autoprune.database.consumers import consumed
from autoprune.database.stitch import Stitcher
from autoprune.database.store import build_database
from autoprune.losses import mse
from autoprune.policy import Policy
from autoprune.repair import FixedPoint, Refit, moments, observe, ridge_towards
from autoprune.tracing.verify import audit, masked, relative_error
from autoprune.tracing.wiring import find_sites
from tests.families import FAMILIES
from tests.small import World, world


def stitcher_of(w: World) -> Stitcher:
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "obs")())
    return Stitcher(w.model, w.structure, database)


def references(w: World):  # type: ignore[no-untyped-def]
    sites = find_sites(w.model, w.task.example_inputs())
    readers = {n for names in consumed(w.structure.groups, sites).values() for n in names}
    sites = {n: s for n, s in sites.items() if n in readers and s.calls == 1}
    return sites, observe(w.model, w.task, w.seen.statistics, sites)


def test_moments_are_mean_and_biased_variance() -> None:
    y = 3.0 + 2.0 * torch.randn(8, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    mean, var = moments(y)
    torch.testing.assert_close(mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(var, y.var((0, 2, 3), unbiased=False))
    flat = y[:, :, 0, 0]
    torch.testing.assert_close(moments(flat)[1], flat.var(0, unbiased=False))


def test_moments_of_a_large_map_come_from_every_other_row_and_stay_close() -> None:
    y = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, var = moments(y)
    torch.testing.assert_close(mean, y[:, :, ::2].mean((0, 2, 3)))
    torch.testing.assert_close(var, y[:, :, ::2].var((0, 2, 3), unbiased=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_model_is_a_fixed_point_of_both_repairs(family: str) -> None:
    w = world(family)
    stitcher = stitcher_of(w)
    sites, reference = references(w)
    for mode in (FixedPoint(stitcher, reference, settle=True), Refit(stitcher, reference, sites)):
        stitcher.stitch(Policy.dense(w.structure))
        with torch.no_grad(), mode:
            w.task.outputs(stitcher.model, w.seen.statistics)
        for (name, a), b in zip(stitcher.model.state_dict().items(), w.model.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def test_a_refit_that_is_forced_on_the_dense_model_changes_it_by_rounding_only() -> None:
    w = world("projection")
    stitcher = stitcher_of(w)
    sites, reference = references(w)
    stitcher.stitch(Policy.dense(w.structure))
    mode = Refit(stitcher, reference, sites)
    mode.changed = True
    with torch.no_grad():
        before = w.task.outputs(w.model, w.seen.statistics)
        with mode:
            w.task.outputs(stitcher.model, w.seen.statistics)
        after = w.task.outputs(stitcher.model, w.seen.statistics)
    assert relative_error(after, before) < 1e-3  # products of bfloat16 factors


@pytest.mark.parametrize("family", FAMILIES)
def test_the_refit_brings_the_outputs_closer_and_leaves_a_plain_model(family: str) -> None:
    w = world(family, samples=256)
    stitcher = stitcher_of(w)
    sites, reference = references(w)
    policy = Policy.of({g.name: max(g.grid[0], (2 * g.width) // 3) for g in w.structure.groups})
    dense = reference.outputs
    with torch.no_grad():
        raw = mse(stitcher.stitch(policy)(w.seen.statistics[0]), dense)
        with Refit(stitcher, reference, sites):
            inside = w.task.outputs(stitcher.model, w.seen.statistics)
        settled = stitcher.model(w.seen.statistics[0])
    torch.testing.assert_close(inside, settled, rtol=1e-3, atol=1e-4)
    assert mse(settled, dense) < raw
    audit(stitcher.model)
    keep = {n: stitcher.database.keep(n, width).tolist() for n, width in policy.widths}
    reference_model = masked(w.model, stitcher.model, w.structure, keep)
    with torch.no_grad():
        assert relative_error(settled, reference_model(w.seen.statistics[0])) < 1e-4


def test_after_a_repair_the_next_stitch_starts_from_the_database_again() -> None:
    w = world("projection")
    stitcher = stitcher_of(w)
    sites, reference = references(w)
    rng = np.random.default_rng(0)
    a, b = (Policy.of({g.name: int(rng.choice(g.grid)) for g in w.structure.groups}) for _ in range(2))
    with torch.no_grad():
        clean = stitcher.stitch(b)(*w.task.example_inputs())
        stitcher.stitch(a)
        with Refit(stitcher, reference, sites):
            w.task.outputs(stitcher.model, w.seen.statistics)
        again = stitcher.stitch(b)(*w.task.example_inputs())
    assert torch.equal(clean, again)


def test_ridge_regression_returns_its_prior_where_the_prior_is_right() -> None:
    g = torch.Generator().manual_seed(0)
    u, prior = torch.randn(2, 50, 6, generator=g), torch.randn(2, 3, 6, generator=g)
    weight, shift = ridge_towards(u, u @ prior.transpose(1, 2) + 0.7, prior, intercept=True)
    torch.testing.assert_close(weight, prior, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shift, torch.full((6,), 0.7), rtol=1e-3, atol=1e-3)
