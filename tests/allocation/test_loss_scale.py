"""The scale of losses: ratios for fidelities, differences for a task's own metric, with or without seeds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from autoprune.allocation.loss_scale import loss_scale
from tests.synthetic import chain, make_problem

PROBLEM = make_problem(chain(3))


def test_fidelities_compare_by_their_logarithm() -> None:
    scale = loss_scale(PROBLEM)
    assert scale.logarithmic
    assert scale(0.2) - scale(0.1) == pytest.approx(math.log(2))
    assert math.isfinite(scale(0.0))


def test_a_metric_tells_good_from_bad_though_there_are_no_seeds() -> None:
    scale = loss_scale(replace(PROBLEM, seeds=(), logarithmic=False))
    assert scale(-0.9) < scale(-0.5) < scale(-0.1)


def test_losses_of_seeds_that_are_not_positive_compare_by_their_spread() -> None:
    below = tuple(replace(e, loss=e.loss - 5.0) for e in PROBLEM.seeds)
    scale = loss_scale(replace(PROBLEM, seeds=below))
    values = [scale(e.loss) for e in below]
    assert not scale.logarithmic
    mean = sum(values) / len(values)
    assert sum((v - mean) ** 2 for v in values) / len(values) == pytest.approx(1.0)
