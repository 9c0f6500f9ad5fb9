"""Where the samples of a batch lie: in dimension 0, some rows each, as entries of a list, or in one piece."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from autoprune.errors import InputError
from autoprune.protocols import Batch

IMAGE = 3
"""Dimensions of one image: a list of as many of them as there are samples is a list of samples."""


def size(batch: Batch) -> int:
    """Samples in a batch; 1 where it cannot be cut into samples (a graph, sequences first)."""
    return samples_of(batch) or 1


def samples_of(batch: Batch) -> int | None:
    """Samples in a batch; None where it is one piece.

    Of a pair (inputs, targets) they are as many as the targets, of other trees as long as the first tensor, and every
    tensor has as many rows or a multiple of them (clips whose frames lie in the batch), or one row for all; a list may
    hold an entry each (images, boxes of an image).

    Raises:
        InputError: the batch holds no tensor.
    """
    n = _count(batch)
    if n is None:
        raise InputError("a batch must be a tree of tensors with the samples in dimension 0; it holds no tensor")
    return n if n and all(_fits(leaf, n) for leaf in _flat(batch, n)[0]) else None


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Samples [start, stop) of a batch, as views; one that is one piece stays whole."""
    return _mapped(batch, lambda t, rows: t[start * rows : stop * rows], lambda entries: entries[start:stop])


def chunks(batch: Batch, batch_size: int) -> tuple[Batch, ...]:
    """A batch cut into batches of `batch_size`; a rest below half of it joins the last, as small ones are noisy.

    One that is one piece stays as it is.
    """
    n = size(batch)
    starts = list(range(0, n, batch_size))
    if len(starts) > 1 and n - starts[-1] < batch_size / 2:
        starts.pop()
    return tuple(cut(batch, a, b) for a, b in zip(starts, [*starts[1:], n], strict=True))


def take(batch: Batch, index: Tensor) -> Batch:
    """The samples at `index`; one that is one piece stays whole."""
    return _mapped(batch, lambda t, rows: take_rows(t, index, rows), lambda entries: [entries[i] for i in index])


def take_rows(tensor: Tensor, index: Tensor, rows: int = 1) -> Tensor:
    """The rows of the samples at `index`, of which each has `rows`."""
    if rows == 1:
        return tensor[index]
    return tensor[(index[:, None] * rows + torch.arange(rows, device=index.device)).flatten()]


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches of one kind as one."""
    if len(batches) == 1:
        return batches[0]
    counts = [size(b) for b in batches]
    columns = zip(*(_flat(b, n)[0] for b, n in zip(batches, counts, strict=True)), strict=True)
    whole = iter([_joined(column, counts) for column in columns])
    return tree_map(lambda _: next(whole), batches[0], is_leaf=lambda node: is_listed(node, counts[0]))


def kind(batch: Batch) -> object:
    """What two batches share if they can be joined; None for one that cannot."""
    n = samples_of(batch)
    if n is None:
        return None
    leaves, shape = _flat(batch, n)
    return str(shape), tuple(_leaf_kind(leaf, n) for leaf in leaves)


def as_tensors(batch: Batch) -> Batch:
    """A batch with tensors for numpy arrays and plain dicts for other mappings."""
    if isinstance(batch, np.ndarray):
        return torch.from_numpy(batch)
    if isinstance(batch, Mapping):
        return {name: as_tensors(value) for name, value in batch.items()}
    if isinstance(batch, list):
        return [as_tensors(value) for value in batch]
    if type(batch) is tuple:
        return tuple(as_tensors(value) for value in batch)
    return batch


def _mapped(batch: Batch, rows: Callable[[Tensor, int], Tensor], entries: Callable[[list[Any]], list[Any]]) -> Batch:
    """`batch` with other rows of its tensors and entries of its lists of samples."""
    n = samples_of(batch)
    if n is None:
        return batch

    def change(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf if _is_shared(leaf, n) else rows(leaf, len(leaf) // n)
        return entries(leaf) if isinstance(leaf, list) else leaf

    return tree_map(change, batch, is_leaf=lambda node: is_listed(node, n) and node is not batch)


def _flat(batch: Batch, n: int) -> tuple[list[Any], Any]:
    return tree_flatten(batch, is_leaf=lambda node: is_listed(node, n) and node is not batch)


def _count(batch: Batch) -> int | None:
    """Samples by their number; 0 where inputs and targets do not agree, None without a tensor."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        return _length(batch)
    inputs, targets = _length(batch[0]), _length(batch[1])
    if inputs is None or targets is None or inputs == targets:
        return targets if inputs is None else inputs
    if _has_list(batch[0], targets) or (targets and inputs % targets == 0):
        return targets
    return inputs if inputs and targets % inputs == 0 else 0


def _length(node: Any) -> int | None:
    """Dimension 0 of the first tensor; entries of a list that holds one thing a sample."""
    if isinstance(node, Tensor):
        return len(node) if node.dim() else None
    if isinstance(node, list) and node and (_is_plain(node) or len({_length(entry) for entry in node}) > 1):
        return len(node)
    if isinstance(node, list) and node and isinstance(node[0], Mapping):
        return len(node)
    children = node.values() if isinstance(node, Mapping) else node if isinstance(node, tuple | list) else ()
    return next((n for child in children if (n := _length(child)) is not None), None)


def _has_list(node: Any, n: int) -> bool:
    if isinstance(node, list) and len(node) == n:
        return True
    children = node.values() if isinstance(node, Mapping) else node if isinstance(node, tuple | list) else ()
    return any(_has_list(child, n) for child in children)


def is_listed(node: Any, n: int) -> bool:
    """Whether a list holds one entry a sample, rather than tensors that hold all samples each."""
    if not isinstance(node, list) or len(node) != n:
        return False
    if _is_plain(node) or isinstance(node[0], Mapping):
        return True
    tensors = [t for t in node if isinstance(t, Tensor)]
    whole = len(tensors) == n and all(t.dim() and len(t) % n == 0 for t in tensors)
    return not whole or all(t.dim() == IMAGE for t in tensors)


def _is_plain(entries: Sequence[Any]) -> bool:
    """Numbers, words and single values: one a sample."""
    return all(isinstance(e, int | float | str | bytes) or (isinstance(e, Tensor) and not e.dim()) for e in entries)


def _is_shared(tensor: Tensor, n: int) -> bool:
    """Whether all samples share the tensor."""
    return not tensor.dim() or (len(tensor) == 1 and n > 1)


def _fits(leaf: Any, n: int) -> bool:
    if not isinstance(leaf, Tensor) or _is_shared(leaf, n):
        return True
    return len(leaf) % n == 0 if n > 1 else len(leaf) == 1


def _leaf_kind(leaf: Any, n: int) -> object:
    if isinstance(leaf, Tensor):
        if _is_shared(leaf, n):
            values = leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            return "shared", leaf.dtype, tuple(leaf.shape), hashlib.sha256(values).digest()
        return "rows", leaf.dtype, tuple(leaf.shape[1:]), len(leaf) // n
    if isinstance(leaf, list):
        return "list"
    return repr(leaf) if isinstance(leaf, int | float | str | bytes | None) else type(leaf).__name__


def _joined(column: Sequence[Any], counts: Sequence[int]) -> Any:
    first = column[0]
    if isinstance(first, Tensor):
        return first if _is_shared(first, counts[0]) else torch.cat(list(column))
    return [entry for entries in column for entry in entries] if isinstance(first, list) else first


def tensors_of(batch: Batch) -> list[Tensor]:
    """All tensors of a batch."""
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
