"""What models return, batch by batch, as one: dicts, tuples, dataclasses and output objects keep their type."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor


class RaggedError(Exception):
    """Batches differ in shape beyond dimension 0."""


def cat_trees(batches: Sequence[Any]) -> Any:
    """The same tree with its tensors joined along dimension 0; lists of one thing a sample follow each other.

    Raises:
        RaggedError: tensors differ in another dimension.
    """
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Tensor):
        if len({(t.dtype, t.shape[1:], t.dim()) for t in batches}) > 1:
            raise RaggedError
        return torch.cat(list(batches)) if first.dim() else torch.stack(list(batches))
    if isinstance(first, list) and _is_by_sample(batches):
        return [entry for batch in batches for entry in batch]
    return _rebuilt(first, lambda get: cat_trees([get(b) for b in batches]))


def _is_by_sample(batches: Sequence[list[Any]]) -> bool:
    """Whether lists have one entry a sample, not one a level or head: other lengths, or no tensors of batches."""
    entries = [entry for batch in batches for entry in batch]
    single = all(not isinstance(e, Tensor) or not e.dim() for e in entries)
    return len({len(batch) for batch in batches}) > 1 or single


def _rebuilt(value: Any, made: Callable[[Callable[[Any], Any]], Any]) -> Any:
    """`value` with what `made` gives for each of its parts, told by what takes that part from any of its kind."""
    if isinstance(value, Mapping):
        parts = {name: made(itemgetter(name)) for name in value}
        return dict(parts) if type(value) is dict else type(value)(**parts)
    if isinstance(value, tuple | list):
        items = [made(itemgetter(i)) for i in range(len(value))]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) or (hasattr(value, "__dict__") and vars(value)):
        twin = copy.copy(value)
        for name in [*vars(value)]:
            object.__setattr__(twin, name, made(attrgetter(name)))
        return twin
    return value
