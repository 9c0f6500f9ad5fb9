"""Which tensor of what a model returns counts: stated by key, index or function, else logits or the first one."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import InputError
from autoprune.tracing.outputs import faithful, pick_output, said_output

A, B = torch.zeros(2, 3), torch.ones(2, 4)
IDS = torch.zeros(2, dtype=torch.long)


@dataclass
class Out:
    hidden: Tensor
    logits: Tensor


Named = namedtuple("Named", ["a", "b"])


@pytest.mark.parametrize(
    ("returned", "wanted", "found"),
    [
        (A, None, A),
        ((IDS, A, B), None, A),
        ({"boxes": A, "logits": B}, None, B),
        ({"n": 3, "loss": None, "inner": {"x": B}}, None, B),
        (Out(A, B), None, B),
        ({"boxes": A, "scores": B}, "scores", B),
        (Out(A, B), "hidden", A),
        (Named(A, B), "b", B),
        ((A, B), 1, B),
        ((A, B), -1, B),
        (Out(A, B), 0, A),
        ({"boxes": A, "scores": B}, 1, B),
        ((A, [B]), lambda out: out[1][0], B),
    ],
)
def test_the_output_is_found(returned: Any, wanted: Any, found: Tensor) -> None:
    assert pick_output(returned, wanted) is found


@pytest.mark.parametrize(
    ("returned", "wanted", "words"),
    [
        ({"boxes": A, "scores": B}, "score", "did you mean 'scores'"),
        ((A, B), 2, "2 of them"),
        ((A, B), "logits", "it has no names"),
        (IDS.tolist(), None, "without a floating tensor"),
        ({"ids": 1}, "ids", "no tensor"),
        ((A, B), lambda out: out.logits, "failed on a tuple"),
    ],
)
def test_an_output_that_is_not_there_is_named_with_what_is(returned: Any, wanted: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        pick_output(returned, wanted)


def test_which_output_counts_is_said_where_there_are_several() -> None:
    assert said_output(A) == ""
    assert said_output({"logits": A}) == "output 'logits'"
    assert said_output((A, B), 1) == "output 1"
    assert "first floating tensor of the outputs, ['boxes']" in said_output({"ids": IDS, "boxes": A})


class Keyed(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": x, "b": x + 1}


class Task:
    """A task class that names its output, and one whose method returns the whole output."""

    outputs: Any = "b"


class Bare:
    """A task class that says nothing of outputs."""


def test_a_task_class_may_name_its_output_or_return_all_of_it() -> None:
    assert torch.equal(faithful(Bare(), Keyed(), (A, IDS)), A)  # type: ignore[arg-type]
    named, whole = Task(), Task()
    whole.outputs = lambda model, batch: model(batch[0])
    assert torch.equal(faithful(named, Keyed(), (A, IDS)), A + 1)  # type: ignore[arg-type]
    assert torch.equal(faithful(whole, Keyed(), (A, IDS)), A)  # type: ignore[arg-type]
