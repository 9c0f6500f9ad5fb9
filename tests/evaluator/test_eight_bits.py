"""Weights of 8 bits while a model is trained: rounded at every look, moved all the same, gone on with."""

from __future__ import annotations

import torch
from torch import nn

from autoprune.evaluator.eight_bits import EightBits
from autoprune.tracing.rounding import nearest


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 4))
    model[0].weight.data = nearest(model[0].weight.detach()).weight
    return model


def trained(model: nn.Module, steps: int, eight: EightBits, seed: int = 0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for i in range(steps):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed + i))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        with eight.exact():
            optimizer.step()


def test_rounded_weights_stay_rounded_and_small_steps_add_up() -> None:
    model = network()
    before, other = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    trained(model, 5, EightBits(model))
    weight = model[0].weight.detach()
    assert torch.equal(nearest(weight).weight, weight)
    assert not torch.equal(weight, before)
    assert not torch.equal(model[2].weight, other)
    assert not torch.equal(nearest(model[2].weight.detach()).weight, model[2].weight)


def test_a_training_that_is_gone_on_with_is_the_same() -> None:
    one, two = network(), network()
    trained(one, 6, EightBits(one))
    first = EightBits(two)
    trained(two, 3, first)
    again = EightBits(two)
    again.load_state([[value.clone() for value in some] for some in first.state()])
    trained(two, 3, again, seed=3)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_model_of_plain_weights_is_left_alone() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.zeros_(model[1].weight)
    assert EightBits(model).state() == [[], []]


def test_what_an_average_holds_is_shown_rounded_and_gone_on_with_as_it_is() -> None:
    model = network()
    eight, exact = EightBits(model), torch.full((20, 16), 0.0123456)
    with eight.within():
        model[0].weight.data.copy_(exact + torch.linspace(0, 1, 16))
        held = model[0].weight.detach().clone()
    assert torch.equal(nearest(model[0].weight.detach()).weight, model[0].weight)
    assert not torch.equal(model[0].weight, held)
    with eight.within():
        assert torch.equal(model[0].weight, held)
