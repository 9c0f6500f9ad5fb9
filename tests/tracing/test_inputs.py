"""A model is called as people call it, and example inputs are cut only where dimension 0 is the sample."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import InputError
from autoprune.tracing.analyze import analyze
from autoprune.tracing.inputs import call_model, few_samples


class Body(nn.Module):
    """Two linears behind any forward: `way(body, *args, **kwargs)` gives what goes in."""

    def __init__(self, way: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(5, 8), nn.Linear(8, 3), way

    def forward(self, x: Any) -> Tensor:
        return self.way(self, x)


class Keywords(Body):
    def forward(self, *, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.way(self, x) * scale


def plain(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.b(m.a(x).relu())
    return y


def from_dict(m: Any, x: Mapping[str, Tensor]) -> Tensor:
    return plain(m, x["x"])


X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Body(plain), X),
        (Body(plain), (X,)),
        (Body(plain), [X]),
        (Body(plain), (X.double().numpy(),)),
        (Body(plain), {"x": X}),
        (Body(from_dict), ({"x": X, "y": X},)),
        (Body(from_dict), UserDict({"x": X, "other": 3})),
        (Keywords(plain), {"x": X}),
        (Keywords(plain), ({"x": X, "scale": 1.0},)),
        (nn.DataParallel(Keywords(plain)), {"x": X}),
    ],
)
def test_inputs_arrive_as_arguments_keywords_or_one_dict(model: nn.Module, inputs: Any) -> None:
    body: Any = model.module if isinstance(model, nn.DataParallel) else model
    assert torch.equal(call_model(model, inputs), plain(body, X))


def test_a_dict_is_analysed_as_a_tuple_is() -> None:
    first = analyze(Body(plain), (X,))
    assert first.names == ("a",)
    assert analyze(Keywords(plain), {"x": X}).groups == first.groups
    assert analyze(Body(from_dict), ({"x": X, "other": X},)).groups == first.groups


def clips(m: Any, x: Tensor) -> Tensor:
    return plain(m, x).view(-1, 3, 3).mean(1)


def pairs(m: Any, x: Tensor) -> Tensor:
    one, other = plain(m, x).chunk(2)
    return one @ other.T


def neighbours(m: Any, x: tuple[Tensor, Tensor]) -> Tensor:
    return plain(m, x[0] + x[0][x[1][0]].sum(0))


EDGES = torch.tensor([[0, 5], [1, 2]])


@pytest.mark.parametrize(
    ("way", "inputs", "kept", "samples"),
    [
        (plain, (X,), 2, 2),
        (plain, (X[:2],), 2, 2),
        (plain, (X[:1],), 1, 1),
        (clips, (X,), 6, 1),
        (clips, (X[:3],), 3, 1),
        (pairs, (X,), 6, 1),
        (pairs, (X[:2],), 2, 1),
        (neighbours, ((X, EDGES),), 6, 1),
        (lambda m, x: plain(m, torch.stack(x)), ([X[0], X[1]],), 5, 1),
    ],
)
def test_example_inputs_are_cut_only_where_dimension_0_is_the_sample(
    way: Callable[..., Tensor], inputs: tuple[Any, ...], kept: int, samples: int
) -> None:
    model = Body(way).eval()
    example = few_samples(model, inputs)
    leaf = example.inputs[0]
    assert len(leaf if isinstance(leaf, Tensor) else leaf[0]) == kept
    assert example.samples == samples
    assert analyze(model, inputs).names == ("a",)


@pytest.mark.parametrize("inputs", [X, 3, None])
def test_inputs_that_are_no_tuple_are_refused(inputs: Any) -> None:
    with pytest.raises(InputError, match="must be a tuple of the model's arguments"):
        analyze(Body(plain), inputs)
