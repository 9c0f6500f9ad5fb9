"""Where the last training of a pruned model starts, for recoveries that do more than train what was cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from autoprune import plugins
from autoprune.database.batches import Parts, StatisticsOnly
from autoprune.database.build import build_database
from autoprune.errors import RunError
from autoprune.evaluation import Ask, Tier
from autoprune.evaluator.keep_best import copied as weights_of
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.policy import Policy
from autoprune.protocols import Criterion, PathRecovery, Progress, RewoundRecovery, SparseRecovery, Task
from autoprune.recovery import Watched
from autoprune.structure import Structure
from autoprune.tracing.copies import copied
from autoprune.tracing.slim import slim
from autoprune.tracing.verify import masked

Kept = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Start:
    """The weights of the pruned model, the atoms that it keeps, and the steps of training that are left."""

    weights: Mapping[str, Tensor]
    keep: Kept
    steps: int


@dataclass(frozen=True)
class Bench:
    """What models are cut on: the dense model, prepared, with its data, and how a search cuts and repairs."""

    task: Task
    structure: Structure
    settings: Settings
    criterion: Criterion
    dense: nn.Module
    parts: Parts
    tier: Tier

    def cut(self, model: nn.Module, policy: Policy, keep: Kept | None) -> tuple[nn.Module, Kept]:
        """(`model` at `policy`, repaired, what it keeps): among `keep`, where that is given."""
        widths = policy.as_dict()
        grids = {g.name: tuple(sorted({widths[g.name], g.width})) for g in self.structure}
        structure = replace(self.structure, groups=tuple(replace(g, grid=grids[g.name]) for g in self.structure))
        seen = StatisticsOnly(self.task, self.parts.statistics, min(self.settings.batch_size, self.parts.fits))
        database = build_database(model, structure, seen, self.criterion, keep)
        evaluator = TieredEvaluator(self.task, structure, database, self.settings, model, parts=self.parts)
        small = copied(evaluator.repaired(Ask(policy, self.tier)))
        return small, {name: tuple(database.keep(name, width).tolist()) for name, width in policy.widths}


def started(recovery: Watched, bench: Bench, policy: Policy, keep: Kept, steps: int, seed: int) -> Start | None:
    """What `recovery` makes before its last training of `steps` in all; None of one that only trains what was cut.

    `keep` are the atoms that the policy keeps of the dense model.

    Raises:
        RunError: a training on the way diverges.
        InputError: what the recovery refuses.
    """
    made = recovery.recovery
    if callable(getattr(made, "path", None)) and isinstance(made, PathRecovery):
        with _told(recovery):
            path = [*made.path(bench.structure, policy)]
        return _along(path, recovery, bench, steps, seed)
    if callable(getattr(made, "before", None)) and isinstance(made, SparseRecovery):
        model, first = copied(bench.dense), max(1, int(made.share * steps))
        with _told(recovery):
            training = made.before(model, bench.dense, bench.structure.groups, bench.task, first, seed)
            _trained(training, "before the cut")
        small, kept = bench.cut(model, policy, None)
        return Start(weights_of(small), kept, max(1, steps - first))
    if callable(getattr(made, "start", None)) and isinstance(made, RewoundRecovery):
        early = copied(bench.dense)
        with _told(recovery):
            made.start(early)
        slim(early, bench.structure, keep)
        return Start(weights_of(early), keep, steps)
    return None


def _told(recovery: Watched) -> AbstractContextManager[None]:
    """What a recovery does wrong names it."""
    return plugins.calling("recovery", recovery.name, "before its last training", spared=(ArithmeticError, RunError))


def _along(path: Sequence[Policy], recovery: Watched, bench: Bench, steps: int, seed: int) -> Start:
    """Cut to each policy of `path`, training after all but the last; what is gone stays gone."""
    model, kept, each = bench.dense, None, max(1, steps // len(path))
    for number, policy in enumerate(path[:-1]):
        small, kept = bench.cut(model, policy, kept)
        training = recovery(small, bench.dense, bench.task, each, seed + number)
        _trained(training, f"in round {number + 1} of {len(path)}")
        model = masked(model, small, bench.structure, kept)
    small, kept = bench.cut(model, path[-1], kept)
    return Start(weights_of(small), kept, max(1, steps - each * (len(path) - 1)))


def _trained(training: Iterator[Progress], when: str) -> None:
    """To the end."""
    try:
        for _ in training:
            pass
    except ArithmeticError as error:
        raise RunError(f"the training {when} diverged ({error}); set a lower recovery.options.learning_rate") from error
