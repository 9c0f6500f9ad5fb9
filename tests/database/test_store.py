"""What the level database holds: the best atoms of every width, and the shift that keeps the mean of the outputs."""

from __future__ import annotations

import torch
from torch import nn

from autoprune import plugins
from autoprune.database.build import build_database
from autoprune.database.stitch import Stitcher
from autoprune.policy import Policy
from tests.small import World, world_of


def perceptron() -> World:
    torch.manual_seed(0)
    return world_of(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), (6,))


def test_every_width_keeps_the_atoms_of_the_highest_scores() -> None:
    w = perceptron()
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "l1_norm")())
    (group,) = w.structure.groups
    best = w.model.get_submodule("0").get_parameter("weight").abs().sum(1).argsort(descending=True).tolist()
    for width in group.grid:
        assert database.keep(group.name, width).tolist() == sorted(best[:width])


def test_the_mean_of_the_outputs_over_the_statistics_samples_stays_that_of_the_dense_model() -> None:
    w = perceptron()
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "obs")())
    (group,) = w.structure.groups
    (x, _), dense = w.statistics, w.model
    with torch.no_grad():
        wanted = dense(x).mean(0)
        for width in (3, 8, 13):
            small = Stitcher(w.model, w.structure, database).stitch(Policy.of({group.name: width}))
            assert (small(x) - dense(x)).abs().max() > 1e-3
            torch.testing.assert_close(small(x).mean(0), wanted, rtol=1e-4, atol=1e-5)
