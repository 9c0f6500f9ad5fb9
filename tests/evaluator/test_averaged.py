"""The average of the weights lies in the model between two steps, and only there."""

from __future__ import annotations

import copy
import io

import torch
from torch import Tensor, nn

from autoprune.evaluator.averaged import Average


class Tied(nn.Module):
    """One matrix under two names, a buffer of numbers and one that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))


def stepped(model: Tied, average: Average, by: float) -> Tensor:
    """What the weights are that train, after a step."""
    with average.training(), torch.no_grad():
        model.a.weight += by
        model.mean += by
        model.count += 1
        average.update()
        return model.a.weight.detach().clone()


def test_it_is_the_moving_average_of_the_weights_that_train_tied_ones_once() -> None:
    model = Tied()
    average, mine = Average(model, 0.9), model.a.weight.detach().clone()
    expected, trained = mine.clone(), mine.clone()
    for step in range(1, 6):
        trained = trained + 1.0
        assert torch.allclose(stepped(model, average, 1.0), trained)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * trained
        torch.testing.assert_close(model.a.weight.detach(), expected)
    assert model.b.weight is model.a.weight
    assert 0.0 < float(model.mean[0]) < 5.0
    assert int(model.count) == 5


def test_gone_on_with_elsewhere_it_is_the_same() -> None:
    first = Tied()
    whole = Average(first, 0.5)
    stepped(first, whole, 1.0)
    other, file = copy.deepcopy(first), io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    again = Average(other, 0.5)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(stepped(first, whole, 2.0), stepped(other, again, 2.0))
    assert torch.equal(first.a.weight, other.a.weight)
    assert torch.equal(first.mean, other.mean)
