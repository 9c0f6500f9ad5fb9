"""All widths of one group: the order in which its atoms stay, and what makes up for those that go; as a file too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoprune.database.consumers import Consumer, Reader
from autoprune.database.factors import Factored, Part
from autoprune.errors import InputError
from autoprune.files.whole import whole

Layout = list[dict[str, object]]
"""Plain facts of readers."""


@dataclass(frozen=True)
class Levels:
    """One group: `scores` float64 [atoms], `order` int64 [atoms], the atom kept longest first, and its readers.

    Of a weight whose zeros are searched the scores are float32 [numbers], and there is no order.
    """

    scores: Tensor
    order: Tensor
    readers: tuple[Factored, ...]

    @staticmethod
    def of(consumers: Sequence[Consumer], scores: Tensor, keep: Sequence[int] | None = None) -> Levels:
        """Rank by `scores`; with `keep`, those atoms stay longest, so that their width holds exactly them.

        Where they do so by their scores, nothing changes, to the last bit.
        """
        scores = scores.double().cpu()
        order = torch.argsort(scores, stable=True).flip(0)
        if keep is not None and set(order[: len(keep)].tolist()) != set(keep):
            ranked = scores.clone()
            ranked[list(keep)] += float(scores.max() - scores.min()) + 1.0
            order = torch.argsort(ranked, stable=True).flip(0)
        return Levels(scores, order, _factored(consumers, order.tolist()))

    @staticmethod
    def of_matrices(consumers: Sequence[Consumer], scores: Tensor) -> Levels:
        """Of a precision: its bits go from the last one on, the columns of its matrices lie as they do in them."""
        return Levels(scores.double().cpu(), torch.arange(len(scores)), _as_they_lie(consumers))

    @staticmethod
    def of_weights(consumers: Sequence[Consumer], scores: Tensor) -> Levels:
        """Of a matrix whose zeros are searched: a score for each number, and no order, for they are too many."""
        return Levels(scores.float().cpu(), torch.empty(0, dtype=torch.long), _as_they_lie(consumers))

    def kept(self, width: int) -> Tensor:
        """Kept atoms, ascending, int64 [width]."""
        return self.order[:width].sort().values

    def entry(self, width: int, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The readers' compensated weights at `width`, and what their biases gain, from the `dense` weights.

        By the names "weight|tensor" and "shift|tensor", the weights restricted to the kept positions of the group.
        """
        made: dict[str, Tensor] = {}
        for reader in self.readers:
            name = reader.reader.weight
            weight, shift = reader.level(dense[name], self.kept(width))
            made[f"weight|{name}"] = weight.contiguous().cpu()
            if shift is not None:
                made[f"shift|{name}"] = shift.cpu()
        return made

    def plain(self) -> tuple[dict[str, Tensor], Layout]:
        """As tensors by name and plain facts."""
        tensors, layout = {"scores": self.scores, "order": self.order}, []
        for i, reader in enumerate(self.readers):
            layout.append(layout_of(reader.reader))
            tensors[f"{i}.positions"] = reader.reader.positions
            for j, part in enumerate(reader.parts):
                tensors |= {f"{i}.{j}.atoms": part.atoms, f"{i}.{j}.factor": part.factor, f"{i}.{j}.mean": part.mean}
        return tensors, layout

    @staticmethod
    def from_plain(t: Mapping[str, Tensor], layout: Layout) -> Levels:
        """The inverse of `plain`; a KeyError where a tensor is missing."""
        readers = []
        for i, facts in enumerate(layout):
            found = [j for j in range(len(t)) if f"{i}.{j}.atoms" in t]
            parts = (Part(*(t[f"{i}.{j}.{part}"] for part in ("atoms", "factor", "mean"))) for j in found)
            readers.append(Factored(reader_of(facts, t[f"{i}.positions"]), tuple(parts)))
        return Levels(t["scores"], t["order"], tuple(readers))


def _as_they_lie(consumers: Sequence[Consumer]) -> tuple[Factored, ...]:
    """Whole matrices, their columns in their own order."""
    return _factored(consumers, range(max((int(c.atoms[-1]) + 1 for c in consumers), default=0)))


def _factored(consumers: Sequence[Consumer], order: Sequence[int]) -> tuple[Factored, ...]:
    """The consumers of each weight, their atoms in `order`."""
    parts: dict[str, list[Consumer]] = {}
    for consumer in consumers:
        parts.setdefault(consumer.reader.weight, []).append(consumer)
    return tuple(Factored(own[0].reader, tuple(Part.of(c, order) for c in own)) for own in parts.values())


def save_tensors(path: Path, tensors: Mapping[str, Tensor], layout: object) -> None:
    """Tensors and plain facts in one safetensors file, whole or not at all."""
    with whole(path) as draft:
        save_file(_apart(tensors), draft, {"layout": json.dumps(layout)})


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory: what the blocks of one consumer have in common is written once a block."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.contiguous().cpu()
        found[name] = own.clone() if own.untyped_storage().data_ptr() in seen else own
        seen.add(own.untyped_storage().data_ptr())
    return found


def load_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """What `save_tensors` wrote, memory-mapped.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names, layout = tuple(file.keys()), json.loads((file.metadata() or {})["layout"])
            return {name: file.get_tensor(name) for name in names}, layout
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> InputError:
    """What is said of a file that is not what it ought to be."""
    return InputError(f"{path}: not a readable level database ({error}); remove it to have it rebuilt")


def layout_of(reader: Reader) -> dict[str, object]:
    """A reader but for its positions, as plain facts."""
    return {k: v for k, v in asdict(reader).items() if k != "positions"}


def reader_of(facts: Mapping[str, object], positions: Tensor) -> Reader:
    """The inverse of `layout_of`."""
    kernel = facts["kernel"]
    assert isinstance(kernel, list)
    return Reader(**{**facts, "kernel": tuple(kernel)}, positions=positions)  # type: ignore[arg-type]
