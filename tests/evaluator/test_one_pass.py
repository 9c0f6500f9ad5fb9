"""Outputs given again: only for the same values in the same mode, once, and only while nobody has written to them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from autoprune.evaluator.one_pass import Once, repeating


class Scaled(nn.Module):
    """Returns its input times a number, in a tree."""

    def forward(self, x: Tensor, by: float = 2.0) -> dict[str, Tensor]:
        return {"y": x * by}


@pytest.fixture
def model() -> Iterator[Scaled]:
    made = Scaled().eval()
    yield made
    assert "forward" not in vars(made)


def test_an_equal_call_gets_the_same_outputs_once(model: Scaled) -> None:
    x = torch.arange(6.0).view(3, 2)
    with repeating(model) as repeat:
        first = model(x)["y"]
        assert model(x.clone())["y"] is first
        assert model(x)["y"] is not first
        assert repeat.calls == 2


def test_other_values_arguments_or_modes_are_computed(model: Scaled) -> None:
    x = torch.arange(6.0).view(3, 2)
    with repeating(model) as repeat:
        assert torch.equal(model(x)["y"], 2 * x)
        assert torch.equal(model(x + 1)["y"], 2 * x + 2)
        assert torch.equal(model(x + 1, by=3.0)["y"], 3 * x + 3)
        assert torch.equal(model(x[:2] + 1, by=3.0)["y"], 3 * x[:2] + 3)
        model.train()
        model(x[:2] + 1, by=3.0)
        assert repeat.calls == 5


def test_outputs_or_inputs_that_were_written_to_are_not_given_again(model: Scaled) -> None:
    x = torch.ones(2)
    with repeating(model):
        model(x)["y"].zero_()
        assert model(x)["y"].tolist() == [2.0, 2.0]
        x.add_(1.0)
        assert model(x)["y"].tolist() == [4.0, 4.0]
    with repeating(model) as repeat, torch.inference_mode():  # whose tensors do not tell
        model(torch.ones(2))
        model(torch.ones(2))
        assert repeat.calls == 2


def test_every_batch_is_scored_once_however_often_and_far_it_is_read(model: Scaled) -> None:
    batches = [(torch.full((2,), float(i)),) for i in range(3)]
    scored: list[int] = []

    def score(i: int, batch: tuple[Tensor]) -> None:
        scored.append(i)
        model(*batch)

    with repeating(model) as repeat:
        once = Once(batches, score, repeat)
        assert len(once) == 3
        assert torch.equal(model(*next(iter(once)))["y"], torch.zeros(2))
        assert (once.finish(), scored) == (0.0, [0, 1, 2])
        for batch in once:
            model(*batch)
        assert scored == [0, 1, 2]
        assert once.finish() == 1.0


def test_a_task_that_goes_round_the_models_forward_is_taken_to_have_made_a_pass_of_its_own(model: Scaled) -> None:
    with repeating(model) as repeat:
        assert Once([(torch.ones(2),)], lambda i, batch: None, repeat).finish() == 1.0
