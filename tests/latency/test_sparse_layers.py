"""Times of one layer, dense and sparse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoprune.errors import InputError
from autoprune.latency import sparse_layers
from autoprune.latency.sparse_layers import pays_from, sparse_times


def test_a_layer_is_timed_at_every_density_and_left_as_it_is() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(512, 512)
    before = layer.weight.detach().clone()
    found = sparse_times(layer, torch.randn(2, 32, 512), (0.5, 0.01), seconds=0.2)
    assert [(t.density, t.columns) for t in found] == [(0.5, 64), (0.01, 64)]
    half, few = (t.timing for t in found)
    assert few.ratio < half.ratio
    assert few.ratio < 1.0
    assert few.dense_ms > 0.0
    assert torch.equal(layer.weight, before)
    (conv,) = sparse_times(nn.Conv2d(4, 8, 3, padding=1), torch.randn(2, 4, 5, 5), (0.1,), seconds=0.1)
    assert conv.columns == 50


def test_from_which_density_on_it_pays() -> None:
    assert pays_from({0.3: 1.2, 0.05: 0.3, 0.1: 0.7}) == 0.1
    assert pays_from({0.3: 0.9, 0.05: 0.3, 0.1: 1.1}) == 0.05
    assert pays_from({0.05: 1.0}) is None


def test_what_cannot_be_timed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"a density must be in \(0, 1\], not 0"):
        sparse_times(nn.Linear(8, 8), torch.randn(2, 8), (0.0,))
    with pytest.raises(InputError, match=r"Conv1d.* has no sparse twin"):
        sparse_times(nn.Conv1d(4, 4, 3), torch.randn(1, 4, 8), (0.1,))
    monkeypatch.setattr(sparse_layers, "why_not", lambda: "no MKL")
    with pytest.raises(InputError, match="this torch multiplies no sparse matrices: no MKL"):
        sparse_times(nn.Linear(8, 8), torch.randn(2, 8), (0.1,))
