"""Bytes by format, against files and against counts by hand."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import scipy.sparse
import torch
from torch import Tensor

from autoprune.application.formats import bytes_by_format
from autoprune.errors import InputError

HAS_ZSTD = importlib.util.find_spec("zstandard") is not None


def sparse(rows: int, columns: int, density: float) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=draw) * (torch.rand(rows, columns, generator=draw) < density)


def test_bytes_are_those_that_count_by_hand() -> None:
    weight = torch.tensor([[1.0, 0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 3.0]])
    assert bytes_by_format({"a": weight, "b": weight.to(torch.int8)}, zstd=False) == {
        "dense": {"plain": 40 + 10},
        "mask": {"plain": 2 + 12 + 2 + 3},
        "csr": {"plain": 3 + 3 + 12 + 3 + 3 + 3},
    }


def test_types_of_indices_are_the_smallest_that_hold_them() -> None:
    weight = sparse(40, 300, 0.1)
    kept = int(weight.count_nonzero())
    assert 255 < kept < 65_536
    twin = scipy.sparse.csr_array(weight.numpy())
    sizes = 2 * len(twin.indptr) + 2 * len(twin.indices) + twin.data.nbytes
    assert bytes_by_format({"a": weight}, zstd=False)["csr"]["plain"] == sizes
    assert bytes_by_format({"a": weight.view(40, 3, 10, 10)}, zstd=False)["csr"]["plain"] == sizes
    assert bytes_by_format({"a": weight.to(torch.bfloat16)}, zstd=False)["csr"]["plain"] == sizes - 2 * kept


@pytest.mark.skipif(not HAS_ZSTD, reason="needs the extra autoprune[zstd]")
def test_zstd_takes_the_zeros_of_a_dense_file_and_hardly_anything_of_values() -> None:
    found = bytes_by_format({"a": sparse(200, 400, 0.1)})
    assert found["dense"]["zstd"] < 0.25 * found["dense"]["plain"]
    assert 0.8 * found["mask"]["plain"] < found["mask"]["zstd"] <= found["mask"]["plain"]
    assert found["mask"]["zstd"] < found["dense"]["zstd"]
    assert found["mask"]["zstd"] < found["csr"]["zstd"]


def test_without_its_package_zstd_is_left_out_or_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match=r"bytes after zstd need zstandard.*pip install 'autoprune\[zstd\]'") as caught:
        bytes_by_format({"a": torch.ones(2, 2)}, zstd=True)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert set(bytes_by_format({"a": torch.ones(2, 2)})["dense"]) == {"plain"}
