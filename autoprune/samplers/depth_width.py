"""Depth outside, widths inside: blocks leave one by one, each choice made with the earlier ones gone (ALGORITHMS 2c).

At every set of blocks along that way the knapsack finds widths for the budgets; what these are worth seeds evolution.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from autoprune.allocation.budget import Projector
from autoprune.allocation.depth import Depth
from autoprune.allocation.knapsack import penalties
from autoprune.allocation.loss_scale import LEAST_LOSS
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.policy import Policy
from autoprune.protocols import Problem
from autoprune.samplers.evolution import FRACTIONS, Evolution

TARGETS = 5  # over the budget range, beside the asked ones
SHARE = 1 / 3  # of the ledger, at most, for the way down
LEAST_SAVED = 1e-12  # of a cost that does not see a block, or of one inside of an absent one
STEEP = 3.0  # times the loss at which the narrowest widths of the full depth end: further down nothing is won


@dataclass
class _Step:
    """One choice on the way: the blocks that may go next, and what each was worth."""

    policies: list[tuple[str, Policy]]
    told: dict[str, Evaluation] = field(default_factory=dict)
    asked: int = 0


class DepthWidth:
    """Greedy in depth, a knapsack in width at each of `sets` depths at most, then evolution from what was found.

    At every step the `tried` blocks are evaluated that promise most by the sensitivity table, with all that went before
    gone; the one goes whose loss rises least for what it saves. Of each budget the `best` sets by what was measured
    of them and what the table predicts of the widths are asked. All evaluations are on the ledger.
    """

    uses_table = True
    uses_seeds = True

    def __init__(
        self, problem: Problem, rng: np.random.Generator, *, sets: int = 8, tried: int = 4, best: int = 2
    ) -> None:
        for name, value in (("sets", sets), ("tried", tried), ("best", best)):
            if type(value) is not int or value < 1:
                raise InputError(f"search.options.{name} must be a whole number from 1, not {value!r}")
        self._blocks = [g.name for g in problem.structure.groups if g.kind == "block"]
        if not self._blocks:
            raise InputError(
                "sampler depth_width needs blocks in the space, and there are none: let space.granularity be auto or "
                "name block, or take another sampler"
            )
        budget = problem.budget
        Projector(problem.structure, problem.costs).check({**budget.limits, budget.cost: budget.low})
        self._problem, self._rng, self._sets, self._tried, self._best = problem, rng, sets, tried, best
        self._penalties = penalties(problem, "sampler depth_width")
        self._alone = {g.name: float(p[0]) for g, p in zip(problem.structure.groups, self._penalties, strict=True)}
        self._depths = [(Depth(problem.structure, problem.costs, self._penalties), 0.0)]
        self._targets = sorted({*np.linspace(budget.low, budget.high, TARGETS).tolist(), *budget.at}, reverse=True)
        self._seen = {s.ask.policy for s in problem.seeds if s.ask.fraction == 1.0 and s.ask.tier == problem.tier}
        self._known: dict[frozenset[str], Depth] = {}
        self._solved: dict[tuple[frozenset[str], float], tuple[Policy, float] | None] = {}
        self._found: list[Evaluation] = []
        self._waiting: deque[str] = deque()  # what each ask was for: a block, "width" or "evolution"
        self._spent = 0.0
        self._step = self._next_step()
        self._evolution: Evolution | None = None

    def ask(self) -> Ask:
        """A block of the present step; widths while its answers are awaited, and after the last one; then children."""
        if self._evolution is None and self._step is not None and self._step.asked < len(self._step.policies):
            name, policy = self._step.policies[self._step.asked]
            self._step.asked += 1
            self._waiting.append(name)
            return Ask(policy, self._problem.tier, FRACTIONS[self._problem.tier][0])
        widths = self._width() if self._evolution is None else None
        if widths is not None:
            self._waiting.append("width")
            self._seen.add(widths)
            return Ask(widths, self._problem.tier)
        if self._evolution is None:
            self._evolution = Evolution(replace(self._problem, seeds=(*self._problem.seeds, *self._found)), self._rng)
        self._waiting.append("evolution")
        return self._evolution.ask()

    def tell(self, evaluation: Evaluation) -> None:
        """Take a step when all of its blocks are known; keep what widths are worth."""
        what = self._waiting.popleft()
        if what == "evolution":
            assert self._evolution is not None
            self._evolution.tell(evaluation)
        elif what == "width":
            self._found.append(evaluation)
            if self._evolution is not None:
                self._evolution.know(evaluation)
        else:
            self._spent += evaluation.passes
            assert self._step is not None
            self._step.told[what] = evaluation
            if len(self._step.told) == len(self._step.policies):
                self._go(self._step)

    def _go(self, step: _Step) -> None:
        """Leave out the block whose loss rises least for what it saves, if that is worth anything."""
        depth, before = self._depths[-1]
        worth: list[tuple[float, str, float]] = []
        for name, evaluation in step.told.items():
            if evaluation.ok:
                loss = evaluation.loss - self._dense
                worth.append((max(loss - before, LEAST_LOSS) / self._saved(depth, name), name, max(loss, 0.0)))
        self._step = None
        if worth:
            _, name, loss = min(worth)
            if loss <= STEEP * self._worst:
                self._depths.append((self._without(depth, name), loss))
                self._step = self._next_step()

    def _next_step(self) -> _Step | None:
        """The blocks to try next, each with the widest widths that the budget allows; None where the way ends."""
        depth, _ = self._depths[-1]
        budget = self._problem.budget
        left = [b for b in self._blocks if b not in depth.absent and self._saved(depth, b) > LEAST_SAVED]
        enough = depth.cost(budget.cost) <= budget.low or len(self._depths) > self._sets
        if not left or enough or self._spent >= SHARE * self._problem.n_trials:
            return None
        promising = sorted(left, key=lambda b: (self._alone[b] / self._saved(depth, b), b))[: self._tried]
        policies = [(b, self._solution(self._without(depth, b), budget.high)) for b in promising]
        there = [(b, found[0]) for b, found in policies if found is not None]
        return _Step(there) if there else None

    def _saved(self, depth: Depth, name: str) -> float:
        """What the budget's cost loses with a block, all that is left at its dense widths."""
        cost = self._problem.budget.cost
        return max(depth.cost(cost) - self._without(depth, name).cost(cost), LEAST_SAVED)

    def _solution(self, depth: Depth, target: float) -> tuple[Policy, float] | None:
        key = depth.absent, target
        if key not in self._solved:
            budget = self._problem.budget
            self._solved[key] = depth.solved({**budget.limits, budget.cost: target})
        return self._solved[key]

    def _without(self, depth: Depth, name: str) -> Depth:
        problem, absent = self._problem, depth.absent | {name}
        if absent not in self._known:
            self._known[absent] = Depth(problem.structure, problem.costs, self._penalties, absent)
        return self._known[absent]

    def _width(self) -> Policy | None:
        """The most promising widths, at the depths so far, that nobody asked for yet."""
        return next((p for p in self._promising() if p not in self._seen), None)

    def _promising(self) -> Iterator[Policy]:
        """For every budget the best depths' policies, the best of all budgets first."""
        ranked = []
        for target in self._targets:
            there = []
            for depth, loss in self._depths:
                if (found := self._solution(depth, target)) is not None:
                    there.append((loss + found[1], found[0].digest, found[0]))
            ranked.append([policy for *_, policy in sorted(there, key=lambda one: one[:2])])
        for place in range(self._best):
            yield from (policies[place] for policies in ranked if len(policies) > place)

    @property
    def _dense(self) -> float:
        """The loss of the unpruned model, as the table has it."""
        table = self._problem.table or {}
        losses = [table[g.name][g.width] for g in self._problem.structure.groups if g.width in table.get(g.name, {})]
        return min(losses, default=0.0)

    @property
    def _worst(self) -> float:
        """What the table predicts of the narrowest widths at full depth; of blocks alone, of all of them absent."""
        blocks = [g.kind == "block" for g in self._problem.structure.groups]
        widths = [p[0] for p, block in zip(self._penalties, blocks, strict=True) if not block]
        return float(np.sum(widths or [p[0] for p in self._penalties]))
