"""`loss: auto`: the loss and the class axis by the outputs' shape and the targets beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autoprune.losses._auto import choose, targets_of

CLASSES = torch.tensor([0, 2, 1, 2])
YES = torch.tensor([0.0, 1.0, 1.0, 0.0])


def outputs(*shape: int) -> Tensor:
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("shape", "targets", "expected"),
    [
        ((3,), CLASSES, ("kl", -1)),
        ((3,), CLASSES[:, None], ("kl", -1)),
        ((3,), None, ("kl", -1)),
        ((3,), torch.eye(3)[CLASSES], ("kl", -1)),
        ((3,), torch.eye(3)[CLASSES] + torch.eye(3)[[1, 1, 0, 0]], ("bernoulli_kl", -1)),
        ((3,), torch.tensor([[1, 0, 1]] * 4), ("bernoulli_kl", -1)),
        ((3,), torch.tensor([[1.0, 0.0, 1.0]] * 4), ("bernoulli_kl", -1)),
        ((3,), torch.tensor([[True, False, True]] * 4), ("bernoulli_kl", -1)),
        ((3,), outputs(3), ("mse", -1)),
        ((4,), {"boxes": outputs(4), "labels": CLASSES}, ("mse", -1)),
        ((1,), YES[:, None], ("bernoulli_kl", -1)),
        ((1,), YES, ("bernoulli_kl", -1)),
        ((), YES, ("bernoulli_kl", -1)),
        ((1,), YES.long(), ("bernoulli_kl", -1)),
        ((1,), CLASSES, ("mse", -1)),
        ((1,), outputs(1), ("mse", -1)),
        ((1,), YES.clamp(0.1, 0.9), ("bernoulli_kl", -1)),
        ((), outputs(), ("mse", -1)),
        ((1,), None, ("mse", -1)),
        ((3, 8, 8), torch.zeros(4, 8, 8, dtype=torch.long), ("kl", 1)),
        ((8, 8, 3), torch.zeros(4, 8, 8, dtype=torch.long), ("kl", -1)),
        ((3, 8, 8), None, ("kl", 1)),
        ((1, 8, 8), torch.ones(4, 8, 8), ("bernoulli_kl", 1)),
        ((3, 8, 8), outputs(3, 8, 8), ("mse", 1)),
        ((9, 5), torch.zeros(4, 9, dtype=torch.long), ("kl", -1)),
        ((5, 9), torch.zeros(4, 9, dtype=torch.long), ("kl", 1)),
        ((9, 5), None, ("kl", -1)),
    ],
)
def test_the_loss_follows_from_outputs_and_targets(
    shape: tuple[int, ...], targets: Any, expected: tuple[str, int]
) -> None:
    found = choose(outputs(*shape), targets)
    assert (found.name, found.classes) == expected
    assert str([4, *shape]) in found.why


def test_a_regression_of_shares_is_none_of_soft_labels() -> None:
    shares = torch.tensor([0.2, 0.7, 0.4, 0.9])
    assert choose(shares[:, None] + 0.05, shares).name == "mse"
    assert choose(8 * shares[:, None] - 4, shares).name == "bernoulli_kl"
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert choose(pixels, pixels).name == "mse"


def test_a_stated_axis_makes_classes_of_what_lies_along_it() -> None:
    found = choose(outputs(6, 3, 8), None, classes=2)
    assert (found.name, found.classes) == ("kl", 2)
    assert choose(outputs(1), YES, classes=1).name == "bernoulli_kl", "one class is one logit"


def test_targets_are_found_in_pairs_and_by_their_names() -> None:
    assert targets_of((0, 1)) == 1
    assert targets_of({"input_ids": 0, "labels": 2}) == 2
    assert targets_of({"image": 0}) is None
    assert targets_of((1, 2, 3)) is None
