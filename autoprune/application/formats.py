"""Bytes of masked weights by the format that holds them: dense, bits and values, CSR; each plain and after zstd."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autoprune.errors import InputError
from autoprune.tracing.masks import packed

LEVEL = 3
"""Of zstd, its own default: what servers and file systems compress with as they go."""
INDICES = (np.uint8, np.uint16, np.uint32, np.uint64)


def bytes_by_format(weights: Mapping[str, Tensor], zstd: bool | None = None) -> dict[str, dict[str, int]]:
    """{format: {"plain": bytes, "zstd": bytes}} of all `weights` [outputs, ...] together, in the type that they have.

    `dense` is every number, `mask` a bit a number and the values that are not zero, `csr` these with their columns and
    the beginnings of rows, each in the smallest unsigned type that holds them; a row is an output. Each part is
    compressed by itself (zstd, level 3). `zstd` None is where its package is installed.

    Raises:
        InputError: `zstd` is asked for, and its package is not installed.
    """
    sizes: dict[str, Callable[[bytes], int]] = {"plain": len}
    if zstd is None:
        zstd = importlib.util.find_spec("zstandard") is not None
    if zstd:
        sizes["zstd"] = _after_zstd()
    found = {form: dict.fromkeys(sizes, 0) for form in FORMATS}
    for weight in weights.values():
        for form, parts in FORMATS.items():
            for part in parts(weight.detach().cpu()):
                for name, size in sizes.items():
                    found[form][name] += size(part)
    return found


def _dense(weight: Tensor) -> Iterator[bytes]:
    yield _raw(weight)


def _mask(weight: Tensor) -> Iterator[bytes]:
    yield _raw(packed(weight != 0))
    yield _raw(weight[weight != 0])


def _csr(weight: Tensor) -> Iterator[bytes]:
    rows = weight.flatten(1)
    mask = rows != 0
    ends = np.concatenate(([0], mask.sum(1).cumsum(0).numpy()))
    yield _smallest(ends, int(ends[-1])).tobytes()
    yield _smallest(mask.nonzero()[:, 1].numpy(), rows.shape[1] - 1).tobytes()
    yield _raw(rows[mask])


FORMATS: Mapping[str, Callable[[Tensor], Iterator[bytes]]] = {"dense": _dense, "mask": _mask, "csr": _csr}


def _smallest(numbers: npt.NDArray[Any], most: int) -> npt.NDArray[Any]:
    return numbers.astype(next(kind for kind in INDICES if most <= np.iinfo(kind).max))


def _raw(tensor: Tensor) -> bytes:
    """Its numbers as they lie in a file; numpy does not know every type, and bytes all are."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _after_zstd() -> Callable[[bytes], int]:
    try:
        import zstandard
    except ImportError as error:
        raise InputError(
            f"bytes after zstd need zstandard, which cannot be imported ({error}): pip install 'autoprune[zstd]'"
        ) from error
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    return lambda part: len(compressor.compress(part))
