"""Building a level database: one pass over the data, then for every group one pass of drops and its factors."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autoprune.database.batches import StatisticsOnly
from autoprune.database.consumers import (
    Consumer,
    consumed,
    consumers_of,
    cut_channels,
    gram_bytes,
    in_matrices,
    matrices_of,
    norm_scale,
)
from autoprune.database.grams import Gram, collecting_grams
from autoprune.database.levels import Levels
from autoprune.database.masking import weight_scores
from autoprune.database.rounding import rounding_scores
from autoprune.database.scored import checked, scored, scored_by_grams, scored_weights
from autoprune.database.store import LevelDatabase
from autoprune.files.machine import free_memory
from autoprune.protocols import Batch, Criterion, GramCriterion, Step, Task, finished
from autoprune.structure import Group, Structure
from autoprune.tracing.one_thread import one_thread
from autoprune.tracing.wiring import Site, find_sites

GRAM_SHARE = 4
"""Grams take one part in so many of the free memory, at most."""
STATISTICS = "statistics"
"""What the pass over the samples is called while it runs."""
LEVELS = "ranking"
"""What making the levels in memory is called."""


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
        if self.group.kind == "weight":
            return Levels.of_weights(self.consumers, scores)
        if self.group.matrices:
            return Levels.of_matrices(self.consumers, scores)
        return Levels.of(self.consumers, scores, keep)


@one_thread()
def build_database(
    model: nn.Module,
    structure: Structure,
    task: StatisticsOnly,
    criterion: Criterion,
    keep: Mapping[str, Sequence[int]] | None = None,
) -> LevelDatabase:
    """`building` to its end."""
    return finished(building(model, structure, task, criterion, keep))


def building(
    model: nn.Module,
    structure: Structure,
    task: StatisticsOnly,
    criterion: Criterion,
    keep: Mapping[str, Sequence[int]] | None = None,
) -> Generator[Step, None, LevelDatabase]:
    """Score, rank and factorise every group (ALGORITHMS 2, 2a), in memory.

    With `keep` (kept atoms by group, from a policy file) those atoms are the last to go, so that their width holds
    exactly them. The model is read only and must be in eval mode.

    Raises:
        InputError: see `Ingredients.levels`.
    """
    made = {}
    for part in collecting(model, structure, task, criterion):
        if isinstance(part, Step):
            yield part
        else:
            name = part.group.name
            made[name] = part.levels(criterion, None if keep is None else keep.get(name))
            yield Step(LEVELS, len(made), len(structure), "groups")
    return LevelDatabase.of({name: made[name] for name in structure.names})


def collecting(
    model: nn.Module,
    structure: Structure,
    task: StatisticsOnly,
    criterion: Criterion,
    *,
    done: Collection[str] = (),
    most: int | None = None,
) -> Iterator[Step | Ingredients]:
    """What the levels of each group are made of, but for those called `done`; steps between tell how far it is.

    As many passes over the statistics samples as it takes, each for groups whose Grams fit into `most` bytes (by
    default a share of the free memory): few layers of a large model at a time.
    """
    on_grams = isinstance(criterion, GramCriterion)
    yield Step(STATISTICS)
    ranked = [g for g in structure.groups if g.narrows]
    single = [] if on_grams else [g for g in structure.groups if g.kind == "weight"]
    scores = {} if on_grams or not ranked else scored(criterion, model, ranked, task)
    scores = {**scores, **scored_weights(criterion, model, single, task)}
    batches = task.statistics.cut_to(task.batch_size)
    plan = Plan.of(model, structure.groups, find_sites(model, task.example_inputs()), {g.name for g in single})
    parts = plan.parts([g for g in structure.groups if g.name not in done], most or _room(model) // GRAM_SHARE)
    for number, groups in enumerate(parts):
        read = yield from _reading(model, plan, groups, task, batches, (number, len(parts), len(batches)))
        for group, consumers in read.by_group(model, groups):
            if group.kind == "block":
                own: Tensor | None = read.energy(model, group)
            elif group.kind == "weight":
                own = weight_scores(model, group, consumers) if on_grams else scores.get(group.name)
                own = checked(criterion, group, own)
            elif group.matrices:
                own = rounding_scores(model, group, consumers)
            else:
                own = None if on_grams else checked(criterion, group, scores.get(group.name))
            yield Ingredients(group, consumers, own)


def consumers_by_group(
    model: nn.Module, groups: Sequence[Group], task: Task, batches: Iterable[Batch]
) -> Iterator[tuple[Group, list[Consumer]]]:
    """The consumers of each group with their Grams over `batches`, which are read once."""
    plan = Plan.of(model, groups, find_sites(model, task.example_inputs()))
    yield from finished(_reading(model, plan, groups, task, batches)).by_group(model, groups)


def _room(model: nn.Module) -> int:
    """Free bytes where the Grams lie: on the model's device."""
    device = next(iter(model.parameters())).device
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()


@dataclass(frozen=True)
class Plan:
    """Where weights are used, by which of them each group is read, which are cut, and bytes of their Grams.

    A block wants the last weight of its own that some group feeds, for its score.
    """

    sites: Mapping[str, Site]
    readers: Mapping[str, Sequence[str]]
    wanted: Mapping[str, Sequence[str]]
    cuts: Mapping[str, Sequence[tuple[int, int]]]
    sizes: Mapping[str, int]

    @staticmethod
    def of(model: nn.Module, groups: Sequence[Group], sites: Mapping[str, Site], without: Collection[str] = ()) -> Plan:
        """The plan for `groups`; those called `without` ask for no Grams."""
        readers = consumed(groups, sites) | in_matrices(groups, sites) | {name: [] for name in without}
        known = {w for names in readers.values() for w in names}
        own = {g.name: [s.tensor for s in g.slices if s.tensor in known][-1:] for g in groups if g.kind == "block"}
        cuts = cut_channels(groups, sites, model)
        sizes = {name: gram_bytes(model, sites[name], cuts.get(name)) for name in known}
        return Plan(sites, readers, {**readers, **own}, cuts, sizes)

    def parts(self, groups: Sequence[Group], most: int) -> list[list[Group]]:
        """`groups` in their order, cut where the Grams of the next one would be too many bytes."""
        parts: list[list[Group]] = []
        held: set[str] = set()
        for group in groups:
            new = {*held, *self.wanted[group.name]}
            if not parts or sum(self.sizes[name] for name in new) > max(most, self._bytes(group)):
                parts.append([])
                new = set(self.wanted[group.name])
            parts[-1].append(group)
            held = new
        return parts

    def _bytes(self, group: Group) -> int:
        return sum(self.sizes[name] for name in self.wanted[group.name])


@dataclass(frozen=True)
class _Read:
    """What one pass over samples showed: the Grams of some weights of the plan."""

    plan: Plan
    grams: Mapping[str, Gram]

    def energy(self, model: nn.Module, block: Group) -> Tensor:
        """What a block adds to its stream, as the mean square of its last known weight's outputs: its score [1].

        0 where no group feeds any of its weights: nothing is known of it then.
        """
        if not self.plan.wanted[block.name]:
            return torch.zeros(1, dtype=torch.float64)
        (name,) = self.plan.wanted[block.name]
        return (self.grams[name].energy * norm_scale(model, self.plan.sites[name])).sum().cpu()[None]

    def by_group(self, model: nn.Module, groups: Sequence[Group]) -> Iterator[tuple[Group, list[Consumer]]]:
        for group in groups:
            read = matrices_of if group.matrices else consumers_of
            yield group, read(model, group, self.plan.readers[group.name], self.plan.sites, self.grams)


def _reading(
    model: nn.Module,
    plan: Plan,
    groups: Sequence[Group],
    task: Task,
    batches: Iterable[Batch],
    place: tuple[int, int, int] = (0, 1, 0),
) -> Generator[Step, None, _Read]:
    """One pass for `groups`; `place` is its number, how many there are, and the batches of each, as far as known."""
    number, passes, count = place
    wanted = {w for g in groups for w in plan.wanted[g.name]}
    pass_ = collecting_grams(model, wanted, task, batches, {n: c for n, c in plan.cuts.items() if n in wanted})
    while True:
        try:
            read = number * count + next(pass_)
            yield Step(STATISTICS, read, max(read, passes * count), "batches")
        except StopIteration as end:
            return _Read(plan, end.value)
