"""Building a level database: one pass over the data, then for every group one pass of drops and its factors."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autoprune.database.batches import StatisticsOnly
from autoprune.database.consumers import Consumer, consumed, consumers_of, cut_channels, norm_scale
from autoprune.database.grams import Gram, collecting_grams
from autoprune.database.levels import Levels
from autoprune.database.scored import checked, scored, scored_by_grams
from autoprune.database.store import LevelDatabase
from autoprune.protocols import Batch, Criterion, GramCriterion, Step, Task, finished
from autoprune.structure import Group, Structure
from autoprune.tracing.one_thread import one_thread
from autoprune.tracing.wiring import Site, find_sites

STATISTICS = "statistics"
"""What the pass over the samples is called while it runs."""


@dataclass(frozen=True)
class Ingredients:
    """What the levels of a group are made of; `scores` is None where the criterion works on the consumers' Grams."""

    group: Group
    consumers: Sequence[Consumer]
    scores: Tensor | None

    @property
    def work(self) -> float:
        """What the levels cost, in multiplications: drops and factor are cubic in the columns."""
        return float(sum(len(c.second) * c.second.shape[1] ** 3 for c in self.consumers))

    def on(self, device: torch.device) -> Ingredients:
        """The same on a device, which then computes."""
        moved = (
            replace(c, **{name: getattr(c, name).to(device) for name in ("matrix", "second", "mean", "share")})
            for c in self.consumers
        )
        return replace(self, consumers=tuple(moved))

    def levels(self, criterion: Criterion | None, keep: Sequence[int] | None = None) -> Levels:
        """Rank and factorise.

        Raises:
            InputError: the criterion's scores are not finite, or not one for each atom.
        """
        scores = self.scores
        if scores is None:
            scores = scored_by_grams(criterion, self.group, self.consumers)
        return Levels.of(self.consumers, scores, keep)


@one_thread()
def build_database(
    model: nn.Module,
    structure: Structure,
    task: StatisticsOnly,
    criterion: Criterion,
    keep: Mapping[str, Sequence[int]] | None = None,
) -> LevelDatabase:
    """Score, rank and factorise every group (ALGORITHMS 2, 2a), in memory.

    With `keep` (kept atoms by group, from a policy file) those atoms are the last to go, so that their width holds
    exactly them. The model is read only and must be in eval mode.

    Raises:
        InputError: see `Ingredients.levels`.
    """
    made = {}
    for part in finished(collecting(model, structure, task, criterion)):
        name = part.group.name
        made[name] = part.levels(criterion, None if keep is None else keep[name])
    return LevelDatabase.of(made)


def collecting(
    model: nn.Module, structure: Structure, task: StatisticsOnly, criterion: Criterion
) -> Generator[Step, None, Iterator[Ingredients]]:
    """One pass over the statistics samples, batch by batch; then group by group what its levels are made of."""
    on_grams = isinstance(criterion, GramCriterion)
    yield Step(STATISTICS)
    ranked = [g for g in structure.groups if g.kind != "block"]
    scores = {} if on_grams else scored(criterion, model, ranked, task)
    batches = task.statistics.cut_to(task.batch_size)
    read = yield from _reading(model, structure.groups, task, batches, len(batches))

    def ingredients() -> Iterator[Ingredients]:
        for group, consumers in read.by_group(model, structure.groups):
            if group.kind == "block":
                own: Tensor | None = read.energy(model, group)
            else:
                own = None if on_grams else checked(criterion, group, scores.get(group.name))
            yield Ingredients(group, consumers, own)

    return ingredients()


def consumers_by_group(
    model: nn.Module, groups: Sequence[Group], task: Task, batches: Iterable[Batch]
) -> Iterator[tuple[Group, list[Consumer]]]:
    """The consumers of each group with their Grams over `batches`, which are read once."""
    yield from finished(_reading(model, groups, task, batches)).by_group(model, groups)


@dataclass(frozen=True)
class _Read:
    """What one pass over samples showed: where weights are used, by which of them a group is read, their Grams."""

    sites: Mapping[str, Site]
    readers: Mapping[str, Sequence[str]]
    grams: Mapping[str, Gram]

    def energy(self, model: nn.Module, block: Group) -> Tensor:
        """What a block adds to its stream, as the mean square of its last known weight's outputs: its score [1].

        0 where no group feeds any of its weights: nothing is known of it then.
        """
        known = [s.tensor for s in block.slices if s.tensor in self.grams]
        if not known:
            return torch.zeros(1, dtype=torch.float64)
        scale = norm_scale(model, self.sites[known[-1]])
        return (self.grams[known[-1]].energy * scale).sum().cpu()[None]

    def by_group(self, model: nn.Module, groups: Sequence[Group]) -> Iterator[tuple[Group, list[Consumer]]]:
        for group in groups:
            yield group, consumers_of(model, group, self.readers[group.name], self.sites, self.grams)


def _reading(
    model: nn.Module, groups: Sequence[Group], task: Task, batches: Iterable[Batch], count: int = 0
) -> Generator[Step, None, _Read]:
    sites = find_sites(model, task.example_inputs())
    readers = consumed(groups, sites)
    wanted = {w for names in readers.values() for w in names}
    pass_ = collecting_grams(model, wanted, task, batches, cut_channels(groups, sites, model))
    while True:
        try:
            yield Step(STATISTICS, read := next(pass_), max(read, count), "batches")
        except StopIteration as end:
            return _Read(sites, readers, end.value)
