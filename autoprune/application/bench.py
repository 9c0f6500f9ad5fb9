"""Where models are cut: the dense one, prepared, with its data, and how a search cuts and repairs."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from autoprune.database.batches import Parts, StatisticsOnly, in_format
from autoprune.database.build import building
from autoprune.evaluation import Ask, Tier
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.policy import Policy
from autoprune.protocols import Criterion, Step, Task
from autoprune.structure import Structure
from autoprune.tracing.copies import copied
from autoprune.tracing.slim import slim

Kept = Mapping[str, Sequence[int]]
REPAIR = "repair"


@dataclass(frozen=True)
class Bench:
    """`tier` is how the search repaired, without its training."""

    task: Task
    structure: Structure
    settings: Settings
    criterion: Criterion
    dense: nn.Module
    parts: Parts
    tier: Tier

    def evaluator(
        self, model: nn.Module, structure: Structure, keep: Kept | None
    ) -> Generator[Step, None, TieredEvaluator]:
        """What cuts `model`, as wide as `structure` allows; atoms are ranked so that `keep` are the last to go."""
        seen = StatisticsOnly(self.task, self.parts.statistics, min(self.settings.batch_size, self.parts.fits))
        database = yield from building(model, structure, seen, self.criterion, keep)
        yield Step(REPAIR)
        return TieredEvaluator(self.task, structure, database, self.settings, model, parts=self.parts)

    def cutter(
        self, model: nn.Module, policy: Policy, keep: Kept | None
    ) -> Generator[Step, None, tuple[TieredEvaluator, Kept]]:
        """(What cuts `model` to `policy`, what it keeps there): among `keep`, where that is given."""
        widths = policy.as_dict()
        grids = {g.name: tuple(sorted({widths[g.name], g.width})) for g in self.structure}
        structure = replace(self.structure, groups=tuple(replace(g, grid=grids[g.name]) for g in self.structure))
        evaluator = yield from self.evaluator(model, structure, keep)
        return evaluator, self.kept(evaluator, policy)

    def settled(self, evaluator: TieredEvaluator, policy: Policy, keep: Kept) -> nn.Module:
        """The model of `evaluator` at `policy`, repaired, as a module of its own that holds the atoms of `keep`."""
        repaired = evaluator.repaired(Ask(policy, self.tier))
        return self.bare(keep, repaired)

    def kept(self, evaluator: TieredEvaluator, policy: Policy) -> Kept:
        """The atoms that `evaluator` keeps at a policy."""
        database = evaluator.stitcher.database
        ranked = [g.name for g in self.structure if g.kind != "weight"]
        return {name: tuple(database.keep(name, policy.as_dict()[name]).tolist()) for name in ranked}

    def bare(self, keep: Kept, like: nn.Module | None = None) -> nn.Module:
        """The dense model with the atoms of `keep` alone, without a repair; with the weights of `like`, if it is given.

        However a model comes about, killed and gone on with or not, it is made here, so that its tensors lie alike.
        """
        small = copied(self.dense).requires_grad_(False)
        slim(small, self.structure, keep)
        if like is not None:
            small.load_state_dict(like.state_dict())
        return in_format(small, self.parts.layout).eval()
