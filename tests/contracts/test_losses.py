"""The contract of every file in autoprune/losses: one value a sample, 0 for equal outputs, gradients to follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoprune import plugins
from autoprune.protocols import Loss

SHAPES = [((6, 4), -1), ((6, 3, 5, 2), 1), ((6, 7, 4), -1)]


@pytest.fixture(params=plugins.names("losses"))
def loss(request: pytest.FixtureRequest) -> Loss:
    made: Loss = plugins.load("losses", request.param)
    return made


def pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(shape, generator=generator)
    return dense + 0.3 * torch.randn(shape, generator=generator), dense


@pytest.mark.parametrize(("shape", "classes"), SHAPES)
def test_a_loss_is_one_positive_value_a_sample_and_0_for_equal_outputs(
    loss: Loss, shape: tuple[int, ...], classes: int
) -> None:
    outputs, dense = pair(shape)
    values = loss(outputs, dense, classes=classes)
    assert values.shape == (6,)
    assert bool((values > 0).all())
    assert bool(torch.isfinite(values).all())
    assert torch.equal(values, loss(outputs, dense, classes=classes))
    assert float(loss(dense.clone(), dense, classes=classes).abs().max()) < 1e-6


def test_a_loss_grows_with_the_distance(loss: Loss) -> None:
    outputs, dense = pair((6, 4))
    near, far = (loss(dense + share * (outputs - dense), dense, classes=-1).mean() for share in (0.1, 1.0))
    assert float(near) < float(far)


@pytest.mark.parametrize(("shape", "classes"), SHAPES)
def test_gradients_of_a_loss_are_finite_even_where_outputs_are_equal(
    loss: Loss, shape: tuple[int, ...], classes: int
) -> None:
    outputs, dense = pair(shape)
    for given in (outputs, dense.clone()):
        given.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(given, dense, classes=classes).mean(), given)
        assert bool(torch.isfinite(gradient).all())
        assert given is not outputs or float(gradient.abs().max()) > 0


def test_the_classes_may_lie_along_any_axis(loss: Loss) -> None:
    outputs, dense = pair((6, 3, 5, 2))
    last = (t.movedim(1, -1).contiguous() for t in (outputs, dense))
    assert torch.allclose(loss(outputs, dense, classes=1), loss(*last, classes=-1), atol=1e-6)


def test_the_value_of_a_sample_is_its_own_but_for_a_common_scale(loss: Loss) -> None:
    outputs, dense = pair((6, 4))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    moved = loss(outputs[order], dense[order], classes=-1)
    assert torch.allclose(moved, loss(outputs, dense, classes=-1)[order], atol=1e-6)
