"""Any optimizer of torch by its name, a user's own, and what is said where there is none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from autoprune.errors import InputError
from autoprune.evaluator.optimizers import UNFIT, OptimizerChoice, known


def small(norm: bool = False) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), *([nn.BatchNorm2d(2)] if norm else []))


@pytest.mark.parametrize("convolutional", [True, False])
def test_without_a_name_it_is_the_one_that_suits_the_model(convolutional: bool) -> None:
    made = OptimizerChoice().build(small(convolutional), convolutional, None)
    if convolutional:
        assert isinstance(made, torch.optim.SGD)
        wanted = {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    else:
        assert isinstance(made, torch.optim.AdamW)
        wanted = {"lr": 1e-3, "weight_decay": 0.01, "betas": (0.9, 0.999)}
    assert {key: made.defaults[key] for key in wanted} == wanted


@pytest.mark.parametrize("name", sorted(set(known()) - {*UNFIT, "muon"}))
def test_every_optimizer_of_torch_takes_a_step_at_its_usual_rate(name: str) -> None:
    choice, model = OptimizerChoice(name.upper()), small()
    made = choice.build(model, True, None)
    assert type(made) is known()[name]
    assert made.param_groups[0]["lr"] == choice.usual_rate(True) > 0
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        made.zero_grad()
        model(torch.ones(2, 1, 4, 4)).square().mean().backward()
        made.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_options_and_weight_decay_go_over_what_is_usual() -> None:
    made = OptimizerChoice("SGD", {"momentum": 0.5}, 0.25).build(small(), True, 0.3)
    assert made.defaults["momentum"] == 0.5
    assert made.defaults["nesterov"] is True
    assert (made.defaults["weight_decay"], made.defaults["lr"]) == (0.25, 0.3)
    plain = OptimizerChoice("sgd", {"momentum": 0.0}).build(small(), True, None)
    assert (plain.defaults["momentum"], plain.defaults["nesterov"]) == (0.0, False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("adamm",), r"unknown optimizer 'adamm'; did you mean 'adamw?'\? allowed: .*sgd.*, or 'module:factory'"),
        (("lbfgs",), "evaluates the loss several times a step, which a course does not; allowed: adadelta"),
        (("sgd", {"momentun": 0.9}), "optimizer_options: unknown option 'momentun'; did you mean 'momentum'"),
        (("sgd", {"lr": 0.1}), "lr is learning_rate of the recovery"),
        (("sgd", {"momentum": -1.0}), "optimizer sgd fails: ValueError: Invalid momentum"),
        (("rprop", {}, 0.1), "optimizer rprop takes no weight_decay"),
        ((None, {"momentum": 0.5}), "want the optimizer by name: optimizer: sgd"),
        (("nowhere:Factory",), "cannot import 'nowhere'"),
        ((f"{__name__}:NUMBER",), "must be a function"),
    ],
)
def test_what_there_is_not_is_one_line_before_there_is_a_model(given: tuple[Any, ...], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        OptimizerChoice(*given)
    assert "\n" not in str(caught.value)


NUMBER = 3


def two_rates(parameters: Iterable[nn.Parameter], lr: float, share: float = 0.5) -> Optimizer:
    matrices, vectors = [], []
    for p in parameters:
        (matrices if p.dim() > 1 else vectors).append(p)
    return torch.optim.SGD([{"params": matrices}, {"params": vectors, "lr": share * lr}], lr)


def no_optimizer(parameters: Any, lr: float) -> int:
    return 3


def failing(parameters: Any, lr: float) -> Optimizer:
    raise KeyError("rates")


def test_a_factory_is_called_with_the_parameters_the_rate_and_its_options() -> None:
    made = OptimizerChoice(f"{__name__}:two_rates", {"share": 0.25}).build(small(), True, 0.4)
    assert [group["lr"] for group in made.param_groups] == [0.4, 0.1]
    with pytest.raises(InputError, match="no_optimizer gives a int, not a torch"):
        OptimizerChoice(f"{__name__}:no_optimizer").build(small(), True, 0.4)
    with pytest.raises(InputError, match="failing fails: KeyError: 'rates'"):
        OptimizerChoice(f"{__name__}:failing").build(small(), True, 0.4)
