"""Parameters are counted, buffers are not."""

from __future__ import annotations

from math import prod

from autoprune.costs.params import Params
from tests.synthetic import chain


def test_buffers_are_no_parameters() -> None:
    structure = chain(4)
    specs = [spec for op in structure.ops for spec in op.tensors]
    assert not all(spec.is_parameter for spec in specs)
    assert Params(structure).dense == sum(prod(spec.shape) for spec in specs if spec.is_parameter)
