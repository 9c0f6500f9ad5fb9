"""EvoPress (Sieberling et al. 2024) as a peer: one budget after the other, 1 + 64, three selection stages.

From uniform; offspring are level switches of min(U{1..3}, U{1..3}) groups that keep the budget; 64 are scored on an
eighth of the samples, 16 on half of them, 4 on all (where the parent stands already); the best becomes the parent. The
first two stages ask at `stitch`, the cheapest tier, so that the ledger buys more generations.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from autoprune.allocation.budget import Projector
from autoprune.evaluation import Ask, Evaluation
from autoprune.policy import IntArray, Policy
from autoprune.protocols import Problem

OFFSPRING = 64
STAGES = ((16, "stitch", 0.125), (4, "stitch", 0.5))
LEVEL = 0.1  # of a group's grid: one level


class EvoPress:
    """One generation of one budget at a time; the ledger is split evenly between the budgets."""

    def __init__(self, problem: Problem, rng: np.random.Generator) -> None:
        self._problem, self._rng = problem, rng
        self._projector = Projector(problem.structure, problem.costs)
        self._targets = deque(problem.budget.at)
        self._share = problem.n_trials / len(problem.budget.at)
        self._waiting: deque[Ask] = deque()
        self._answers: list[Evaluation] = []
        self._spent = 0.0
        self._start()

    def ask(self) -> Ask:
        """The next of the stage; while its last answers are out, the parent once more, which costs nothing."""
        if not self._waiting:
            return Ask(self._parent, self._problem.tier)
        return self._waiting.popleft()

    def tell(self, evaluation: Evaluation) -> None:
        """Collect a stage's answers, then select."""
        if evaluation.ask not in self._open:
            return
        self._open.remove(evaluation.ask)
        self._answers.append(evaluation)
        if not self._open:
            self._select()

    def _start(self) -> None:
        budget = self._problem.budget
        self._limits = {**budget.limits, budget.cost: self._targets[0]}
        self._parent = self._projector.project(np.ones(len(self._problem.structure)), self._limits)
        self._parent_loss, self._spent = np.inf, 0.0
        self._pose([self._parent], self._problem.tier, 1.0)
        self._stage = len(STAGES)

    def _pose(self, policies: list[Policy], tier: str, fraction: float) -> None:
        asks = [Ask(p, tier, fraction) for p in policies]  # type: ignore[arg-type]
        self._waiting, self._open, self._answers = deque(asks), set(asks), []
        self._spent += len(asks) * (fraction / 1.5 if tier == "stitch" else 1.0)

    def _select(self) -> None:
        ranked = sorted((e for e in self._answers if e.ok), key=lambda e: e.loss)
        if not ranked:  # a whole stage failed: other children
            self._generate()
        elif self._stage < len(STAGES) - 1:
            self._stage += 1
            self._pose([e.ask.policy for e in ranked[: STAGES[0][0]]], *STAGES[self._stage][1:])
        elif self._stage == len(STAGES) - 1:
            self._stage += 1
            self._pose([e.ask.policy for e in ranked[: STAGES[1][0]]], self._problem.tier, 1.0)
        else:
            if ranked[0].loss < self._parent_loss:
                self._parent, self._parent_loss = ranked[0].ask.policy, ranked[0].loss
            if self._spent >= self._share and len(self._targets) > 1:
                self._targets.popleft()
                self._start()
            else:
                self._generate()

    def _generate(self) -> None:
        codec = self._projector.codec
        start = codec.positions(self._parent.array(codec.structure))
        children: dict[Policy, None] = {}
        for _ in range(8 * OFFSPRING):  # a small space may hold fewer new ones
            child = codec.policy(self._switched(start))
            if child != self._parent:
                children[child] = None
            if len(children) == OFFSPRING:
                break
        self._stage = 0
        self._pose(list(children), *STAGES[0][1:])

    def _switched(self, start: IntArray) -> IntArray:
        """Widen some groups by a level and narrow as many others, until the budget holds again."""
        positions, last = start.copy(), self._projector.codec.last
        level = np.maximum(1, np.round(LEVEL * last).astype(int))
        for _ in range(min(self._rng.integers(1, 4, size=2))):
            up, down = self._rng.choice(len(last), size=2, replace=False)
            positions[up] = min(last[up], positions[up] + level[up])
            while not self._projector.fits(positions[None], self._limits)[0] and positions[down] > 0:
                positions[down] -= 1
        if not self._projector.fits(positions[None], self._limits)[0]:
            return start
        return self._projector.give_back(positions, self._limits)
