"""The repairs: the dense model is their fixed point, and a pruned one gets better."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune import plugins
from autoprune.database.build import build_database
from autoprune.database.consumers import consumed
from autoprune.database.stitch import Stitcher
from autoprune.evaluator.dense_reference import moments, observe
from autoprune.evaluator.repair import FixedPoint, Folded, Refit, correct
from autoprune.losses.mse import mse
from autoprune.policy import Policy
from autoprune.tracing.verify import audit, masked, relative_error
from autoprune.tracing.wiring import find_sites
from tests.families import FAMILIES
from tests.small import World, world, world_of


def stitcher_of(w: World) -> Stitcher:
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "obs")())
    return Stitcher(w.model, w.structure, database)


def references(w: World):  # type: ignore[no-untyped-def]
    sites = find_sites(w.model, w.task.example_inputs())
    readers = {n for names in consumed(w.structure.groups, sites).values() for n in names}
    sites = {n: s for n, s in sites.items() if n in readers and s.calls == 1}
    return sites, observe(w.model, w.task, w.statistics, sites)


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


@pytest.mark.parametrize("offset", [300.0, 3000.0])
def test_a_mean_far_above_the_spread_costs_the_variance_nothing(offset: float) -> None:
    y = offset + torch.randn(256, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, var = moments(y)
    exact = y.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0.0)


class Scaled(nn.Module):
    """A batch norm whose inputs a test pretends to have changed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x)).relu())


def test_a_scaled_and_shifted_activation_gets_such_statistics_and_a_constant_one_stays_small() -> None:
    w = world_of(trained(Scaled), (3, 8, 8), 256)
    stitcher = stitcher_of(w)
    stitcher.stitch(Policy.dense(w.structure))
    norm, shape = "norm", (6,)
    scale, shift = torch.linspace(0.2, 3.0, 6), torch.linspace(-2.0, 5.0, 6)
    md, vd = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.linspace(0.5, 2.0, 6)
    mean, var = correct(stitcher, norm, (md * scale + shift, vd * scale.square()), (md, vd))
    run_mean, run_var = (w.model.state_dict()[f"norm.running_{what}"] for what in ("mean", "var"))
    torch.testing.assert_close(mean, run_mean * scale + shift)
    torch.testing.assert_close(var, run_var * scale.square())
    same = correct(stitcher, norm, (md, vd), (md, vd))
    assert torch.equal(same[0], run_mean)
    assert torch.equal(same[1], run_var)
    level = torch.full(shape, 7.0)
    mean, var = correct(stitcher, norm, (level, torch.zeros(6)), (md, vd))
    assert ((level - mean) / (var + 1e-5).sqrt()).abs().max() < 0.1, "an offset divided by almost nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_model_is_a_fixed_point_of_both_repairs(family: str) -> None:
    w = world(family)
    stitcher = stitcher_of(w)
    sites, reference = references(w)
    for mode in (FixedPoint(stitcher, reference, settle=True), Refit(stitcher, reference, sites)):
        stitcher.stitch(Policy.dense(w.structure))
        with torch.no_grad(), mode:
            w.task.outputs(stitcher.model, w.statistics)
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
        before = w.task.outputs(w.model, w.statistics)
        with mode:
            w.task.outputs(stitcher.model, w.statistics)
        after = w.task.outputs(stitcher.model, w.statistics)
    assert relative_error(after, before) < 1e-3  # products of bfloat16 factors


@pytest.mark.parametrize("family", FAMILIES)
def test_the_refit_brings_the_outputs_closer_and_leaves_a_plain_model(family: str) -> None:
    w = world(family, samples=256)
    stitcher = stitcher_of(w)
    sites, reference = references(w)
    policy = Policy.of({g.name: max(g.grid[0], 1, (2 * g.width) // 3) for g in w.structure.groups})
    dense = reference.outputs
    with torch.no_grad():
        raw = mse(stitcher.stitch(policy)(w.statistics[0]), dense, classes=-1).mean()
        with Refit(stitcher, reference, sites):
            inside = w.task.outputs(stitcher.model, w.statistics)
        settled = stitcher.model(w.statistics[0])
    torch.testing.assert_close(inside, settled, rtol=1e-3, atol=1e-4)
    assert mse(settled, dense, classes=-1).mean() < raw
    audit(stitcher.model)
    keep = {n: stitcher.database.keep(n, width).tolist() for n, width in policy.widths}
    reference_model = masked(w.model, stitcher.model, w.structure, keep)
    with torch.no_grad():
        assert relative_error(settled, reference_model(w.statistics[0])) < 1e-4


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
            w.task.outputs(stitcher.model, w.statistics)
        again = stitcher.stitch(b)(*w.task.example_inputs())
    assert torch.equal(clean, again)


class Silent(nn.Module):
    """A silent channel, a norm that is called twice, an in-place sum and a transposed conv that closes a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner, self.norm1 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.outer, self.norm2 = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up1, self.up2 = nn.Conv2d(8, 6, 3, padding=1), nn.ConvTranspose2d(6, 8, 3, padding=1)
        self.norm3, self.twice = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.norm2(self.outer(self.norm1(self.inner(x)).relu()))
        y.add_(x)
        x = y.relu()
        x = x + self.norm3(self.up2(self.up1(x).relu()))
        return self.head((self.twice(x) + self.twice(2.0 * x)).mean((2, 3)))


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    """With the statistics of a model that has been trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, 0.0, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


class Shortcut(nn.Module):
    """A shortcut whose activation, in place or not, comes after the convolution beside it has run."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(inplace)
        self.conv1, self.conv2 = (nn.Conv2d(12, 12, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.conv1(x) + self.act(x)
        x = self.conv2(x) + self.act(x)
        return self.head(x.mean((2, 3)))


def test_an_input_that_is_written_to_before_its_sum_is_known_is_refitted_as_if_it_were_not() -> None:
    settled = []
    for inplace in (False, True):
        w = world_of(trained(lambda inplace=inplace: Shortcut(inplace)), (3, 8, 8), 128)
        stitcher, (sites, reference) = stitcher_of(w), references(w)
        assert [sites[n].closes for n in ("conv1.weight", "conv2.weight")] == [True, True]
        assert [sites[n].overwritten for n in ("conv1.weight", "conv2.weight")] == [inplace, inplace]
        policy = Policy.of({g.name: (2 * g.width) // 3 for g in w.structure.groups})
        with torch.no_grad():
            raw = mse(stitcher.stitch(policy)(w.statistics[0]), reference.outputs, classes=-1).mean()
            with Refit(stitcher, reference, sites):
                w.task.outputs(stitcher.model, w.statistics)
            settled.append(stitcher.model(w.statistics[0]))
        assert mse(settled[-1], reference.outputs, classes=-1).mean() < raw
    assert torch.equal(*settled)


def silent_world() -> World:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Silent().eval()
        for norm in (model.norm1, model.norm2, model.norm3, model.twice):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
        model.norm2.weight.data[3] = 0.0
    return world_of(model, (3, 8, 8), 256)


def test_odd_wirings_are_repaired_too_and_a_silent_row_stays() -> None:
    w = silent_world()
    stitcher = stitcher_of(w)
    sites, reference = references(w)
    assert {n for n, s in sites.items() if s.closes} == {"outer.weight", "up2.weight"}
    assert "twice" not in reference.norms
    stream = {s.tensor for s in w.structure.group("stem").slices}
    assert {"outer.weight", "up2.weight", "twice.weight"} <= stream  # stays wide, so that rows keep their places
    policy = Policy.of({g.name: g.width if g.name == "stem" else g.width // 2 for g in w.structure.groups})
    with torch.no_grad():
        raw = mse(stitcher.stitch(policy)(w.statistics[0]), reference.outputs, classes=-1).mean()
        before = stitcher.live["outer.weight"][3].clone()
        with Refit(stitcher, reference, sites):
            inside = w.task.outputs(stitcher.model, w.statistics)
        settled = stitcher.model(w.statistics[0])
        with Folded(stitcher.model, find_sites(w.model, w.task.example_inputs())):
            folded = stitcher.model(w.statistics[0])
    torch.testing.assert_close(inside, settled, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(folded, settled, rtol=1e-3, atol=1e-4)
    assert mse(settled, reference.outputs, classes=-1).mean() < raw
    assert torch.equal(stitcher.live["outer.weight"][3], before)
    assert stitcher.live["outer.weight"].abs().max() < 100


def test_an_output_that_the_model_returns_closes_nothing() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            z = self.norm(y)
            return y, (z + x).relu()

    site = find_sites(Both().eval(), (torch.randn(2, 3, 4, 4),))["conv.weight"]
    assert (site.closes, site.norm) == (False, None)


class Rows(nn.Module):
    """A residual stream of tokens whose second product sees the tokens of all samples as one list of rows, or not."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.stem, self.up, self.down, self.head = (nn.Linear(*s) for s in ((5, 8), (8, 12), (12, 8), (8, 4)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.up(x).relu()
        y = self.down(y.flatten(0, 1)).view(x.shape) if self.flat else self.down(y)
        return self.head((x + y).mean(1))


def test_a_weight_that_sees_rows_of_another_shape_is_refitted_to_the_sum_that_it_closes_all_the_same() -> None:
    settled = []
    for flat in (False, True):
        w = world_of(trained(lambda flat=flat: Rows(flat)), (6, 5), 128)
        stitcher, (sites, reference) = stitcher_of(w), references(w)
        assert sites["down.weight"].closes
        policy = Policy.of({g.name: (2 * g.width) // 3 for g in w.structure.groups})
        with torch.no_grad():
            stitcher.stitch(policy)
            with Refit(stitcher, reference, sites):
                w.task.outputs(stitcher.model, w.statistics)
            settled.append(stitcher.model(w.statistics[0]))
    torch.testing.assert_close(*settled)
