"""Patterns n:m: read off the inputs of a weight, wherever they lie."""

from __future__ import annotations

import pytest
import torch

from autoprune.errors import InputError
from autoprune.matrices import numbers_of
from autoprune.tracing.patterns import follows


def test_a_matrix_holds_a_pattern_along_its_inputs_alone() -> None:
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 3.0, 4.0]] * 4)
    assert follows(weight, 2, 4)
    assert not follows(weight, 1, 4)
    assert not follows(weight, 2, 4, dim=0)
    assert follows(weight.T, 2, 4, dim=0)
    weight[1, 1] = 5.0
    assert not follows(weight, 2, 4)
    assert follows(weight, 5, 8)


def test_of_a_convolution_it_runs_over_channels_at_each_position_of_the_kernel() -> None:
    weight = torch.zeros(2, 4, 3, 3)
    weight[:, :2, 0, 0] = weight[:, 2:, 1, 1] = 1.0
    assert follows(weight, 2, 4)
    weight[0, 2, 0, 0] = 1.0  # three channels of four at one position; rows of the flat matrix would not show it
    assert not follows(weight, 2, 4)
    assert follows(torch.zeros(2, 4, 3, 3), 1, 4)


def test_inputs_that_it_does_not_divide_and_vectors_hold_none() -> None:
    assert not follows(torch.zeros(3, 6), 2, 4)
    assert not follows(torch.zeros(4), 2, 4)
    assert follows(torch.zeros(3, 6), 2, 3)


@pytest.mark.parametrize("wrong", ["2", "4:2", "2:2", "0:4", "2:4:8", "a:b", ""])
def test_what_is_no_pattern_is_said(wrong: str) -> None:
    with pytest.raises(InputError, match=r"is no pattern n:m with n below m, such as 2:4"):
        numbers_of(wrong)
    assert numbers_of("2:4") == (2, 4)
