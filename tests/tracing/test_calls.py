"""Every conv and linear is a matrix product of its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoprune.tracing.calls import (
    from_matrix,
    outputs_at,
    parse_call,
    parse_norm,
    pick_positions,
    rows,
    spatial_count,
    to_matrix,
)

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "strided, dilated and grouped": (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (3, 4, 11, 9)),
    "uneven kernel with same padding": (nn.Conv2d(4, 6, (5, 3), padding="same"), (3, 4, 8, 7)),
    "valid padding": (nn.Conv2d(4, 6, 3, padding="valid"), (3, 4, 6, 6)),
    "reflected padding": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 6, 6)),
    "grouped transposed": (nn.ConvTranspose2d(4, 6, 3, 2, padding=1, output_padding=1, groups=2), (3, 4, 5, 6)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2), (3, 4, 5, 6)),
    "transposed in one dimension": (nn.ConvTranspose1d(4, 6, 4, dilation=2, stride=3, padding=2), (3, 4, 9)),
    "one dimension": (nn.Conv1d(4, 6, 3), (3, 4, 9)),
    "three dimensions": (nn.Conv3d(4, 6, 3, padding=1), (3, 4, 5, 6, 7)),
    "linear": (nn.Linear(4, 6), (3, 4)),
    "linear on tokens": (nn.Linear(4, 6), (3, 5, 4)),
    "linear without bias": (nn.Linear(4, 6, bias=False), (3, 5, 2, 4)),
}


class Check(TorchFunctionMode):
    """Recomputes every call as a matrix product at a few positions."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        call = parse_call(func, args, kwargs or {})
        if call is not None:
            positions = pick_positions(spatial_count(call.kind, out), 7, seed=3)
            matrix = to_matrix(call.weight, call.kind, call.groups)
            assert torch.equal(from_matrix(matrix, call.kind, call.weight.shape[2:]), call.weight)
            assert torch.equal(call.run(), out)
            product = (rows(call, positions) @ matrix.flatten(2).transpose(1, 2)).transpose(0, 1).flatten(1)
            product = product if call.bias is None else product + call.bias
            self.errors.append(float((product - outputs_at(call.kind, out, positions)).abs().max()))
        return out


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_call_is_the_product_of_its_rows_and_its_matrix(name: str, channels_last: bool) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    check = Check()
    with check, torch.no_grad():
        layer(x)
    assert len(check.errors) == 1
    assert check.errors[0] < 1e-5


def test_positions_are_seeded_ascending_and_all_of_them_where_there_are_few() -> None:
    assert pick_positions(5, 9, seed=0).tolist() == [0, 1, 2, 3, 4]
    picked = pick_positions(100, 9, seed=0)
    assert torch.equal(picked, pick_positions(100, 9, seed=0))
    assert picked.tolist() == sorted(set(picked.tolist()))


def test_a_batch_norm_in_training_is_not_taken_for_one_with_running_statistics() -> None:
    seen: list[bool] = []

    class Look(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            norm = parse_norm(func, args, kwargs or {})
            out = func(*args, **(kwargs or {}))
            if func is torch.nn.functional.batch_norm:
                seen.append(norm is not None)
                if norm is not None:
                    assert isinstance(out, Tensor)
                    assert torch.equal(norm.run(), out)
            return out

    layer, x = nn.BatchNorm2d(3), torch.randn(4, 3, 2, 2)
    with Look(), torch.no_grad():
        layer.train()(x)
        layer.eval()(x)
    assert seen == [False, True]
