"""The level database on disk: for every group and width the kept atoms and its consumers' compensated weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoprune.database.batches import StatisticsOnly, chunks, digest
from autoprune.database.compensate import drop_atoms
from autoprune.database.consumers import Consumer, consumed, consumers_of
from autoprune.database.grams import collect_grams
from autoprune.errors import InputError
from autoprune.files.whole import whole
from autoprune.protocols import Criterion, FloatArray, GramCriterion
from autoprune.structure import Group, Structure
from autoprune.tracing.fingerprint import weights_fingerprint
from autoprune.tracing.one_thread import one_thread
from autoprune.tracing.wiring import find_sites

ALGORITHM = "2"
"""To be raised when the same inputs give other entries, so that no old file is taken for a new one."""


@dataclass(frozen=True)
class LevelDatabase:
    """Entries by name: "keep|group|width", "weight|group|width|tensor", "shift|group|width|tensor", "score|group".

    A weight entry is the consumer restricted to the kept positions of the group; a shift entry is what its bias gains.
    Tensors read from a file are memory-mapped, so that all workers of a node share them.
    """

    entries: Mapping[str, Tensor]

    def keep(self, group: str, width: int) -> Tensor:
        """Kept atoms, ascending, int64 [width]."""
        return self.entries[f"keep|{group}|{width}"]

    def weight(self, group: str, width: int, tensor: str) -> Tensor | None:
        return self.entries.get(f"weight|{group}|{width}|{tensor}")

    def shift(self, group: str, width: int, tensor: str) -> Tensor | None:
        return self.entries.get(f"shift|{group}|{width}|{tensor}")

    def scores(self, structure: Structure) -> dict[str, FloatArray]:
        """The criterion's scores of every group of `structure`."""
        return {g.name: self.entries[f"score|{g.name}"].double().numpy() for g in structure.groups}

    def save(self, path: Path) -> None:
        """Write atomically: a killed run leaves no half database."""
        with whole(path) as draft:
            save_file({k: v.contiguous() for k, v in self.entries.items()}, draft)

    @staticmethod
    def open(path: Path) -> LevelDatabase:
        try:
            return LevelDatabase(load_file(path))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable level database ({error}); remove it to have it rebuilt") from None


def database_key(model: nn.Module, structure: Structure, task: StatisticsOnly, criterion: str) -> str:
    """16 hex digits of all that decides the entries: structure, weights, statistics samples, criterion and grids."""
    grids = repr([(g.name, g.grid) for g in structure.groups])
    parts = (ALGORITHM, structure.fingerprint, weights_fingerprint(model), digest([task.statistics]), criterion, grids)
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


@one_thread()
def build_database(
    model: nn.Module,
    structure: Structure,
    task: StatisticsOnly,
    criterion: Criterion,
    keep: Mapping[str, Sequence[int]] | None = None,
) -> LevelDatabase:
    """Score, rank, drop and compensate (ALGORITHMS 2): one pass over the data, then one pass of drops a group.

    With `keep` (kept atoms by group, from a policy file) those atoms are the last to go, so that their width holds
    exactly them. The model is read only and must be in eval mode.
    """
    batches = chunks(task.statistics, task.batch_size)
    sites = find_sites(model, task.example_inputs())
    readers = consumed(structure.groups, sites)
    grams = collect_grams(model, {w for names in readers.values() for w in names}, task, batches)
    consumers = {g.name: consumers_of(model, g, readers[g.name], sites, grams) for g in structure.groups}
    scores = _scores(model, structure, task, criterion, consumers)
    entries: dict[str, Tensor] = {}
    for group in structure.groups:
        score = scores[group.name].double().cpu()
        entries[f"score|{group.name}"] = score
        if keep is not None:
            score = score.clone()
            score[list(keep[group.name])] += float(score.max() - score.min()) + 1.0
        entries.update(_levels(group, consumers[group.name], torch.argsort(score, stable=True).tolist()))
    return LevelDatabase(entries)


def _scores(
    model: nn.Module,
    structure: Structure,
    task: StatisticsOnly,
    criterion: Criterion,
    consumers: Mapping[str, Sequence[Consumer]],
) -> Mapping[str, Tensor]:
    """The criterion's scores; one that works on Grams gets those of the database instead of collecting its own."""
    if isinstance(criterion, GramCriterion):
        scores: Mapping[str, Tensor] = {g.name: criterion.from_consumers(g, consumers[g.name]) for g in structure}
    else:
        scores = criterion(model, structure.groups, task)
    for group in structure.groups:
        s = scores.get(group.name)
        if s is None or s.shape != (group.width,) or not bool(torch.isfinite(s).all()):
            got = "nothing" if s is None else f"shape {tuple(s.shape)}, finite: {bool(torch.isfinite(s).all())}"
            raise InputError(
                f"criterion {type(criterion).__name__} must give {group.width} finite scores for group {group.name!r}; "
                f"it gave {got}"
            )
    return scores


def _levels(group: Group, consumers: Sequence[Consumer], order: Sequence[int]) -> dict[str, Tensor]:
    """Entries of one group for the widths of its grid but the dense one."""
    entries = {f"keep|{group.name}|{group.width}": torch.arange(group.width)}
    for level in drop_atoms(consumers, group.width, order):
        if level.width < group.grid[0]:
            break
        if level.width not in group.grid:
            continue
        entries[f"keep|{group.name}|{level.width}"] = level.kept
        for consumer, compensated in zip(consumers, level.matrices, strict=True):
            matrix = consumer.without(level.kept) if consumer.patterned else compensated
            tail = f"{group.name}|{level.width}|{consumer.weight}"
            entries[f"weight|{tail}"] = consumer.native(matrix, level.kept).float().cpu()
            if consumer.site.bias is not None:
                lost = ((consumer.matrix - matrix) @ consumer.mean[:, :, None]).flatten()
                entries[f"shift|{tail}"] = lost.float().cpu()
    return entries
