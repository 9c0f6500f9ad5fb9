"""SPDY: CMA-ES over how much each group's row of the sensitivity table counts; a knapsack makes each draw a policy."""

from __future__ import annotations

from collections import deque

import numpy as np
from cmaes import SepCMA

from autoprune.allocation.budget import Projector, lattice
from autoprune.allocation.knapsack import Allocator, penalties
from autoprune.allocation.loss_scale import loss_scale
from autoprune.codec import Codec
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.policy import IntArray, Policy
from autoprune.protocols import FloatArray, Problem

TRIES = 16  # weights drawn before a repeated policy is let through: close weights often have one knapsack


class Spdy:
    """Frantar and Alistarh 2022: the table says how a group's loss rises, the search how much that counts.

    CMA-ES draws log-weights of the groups' penalties in [-`reach`, `reach`], starting from 0 with the spread `sigma`;
    each draw gets a target from a lattice over the budget range, and the weighted knapsack at that target is asked.
    What is told is the log loss less that of the unweighted knapsack at the same cost: those are asked first.
    """

    uses_table = True
    uses_seeds = True
    one_objective = True

    def __init__(self, problem: Problem, rng: np.random.Generator, *, sigma: float = 0.5, reach: float = 3.0) -> None:
        for name, value in (("sigma", sigma), ("reach", reach)):
            if not 0 < value < np.inf:
                raise InputError(f"search.options.{name} must be a positive number, not {value}")
        budget = problem.budget
        Projector(problem.structure, problem.costs).check({**budget.limits, budget.cost: budget.low})
        self._problem, self._rng, self._sigma, self._reach = problem, rng, sigma, reach
        self._penalties = penalties(problem, "sampler spdy")
        self._allocator, self._codec = Allocator(problem.structure, problem.costs), Codec(problem.structure)
        self._targets = lattice(budget)
        self._unweighted = deque(sorted(set(self._targets.tolist())))
        self._log = loss_scale(problem)
        self._reference: dict[float, float] = {}  # cost -> log loss of the unweighted knapsack there
        self._known = {s.ask.policy: s for s in problem.seeds if s.ask.tier == problem.tier and s.ask.fraction == 1.0}
        self._seen = set(self._known)
        self._asked: deque[FloatArray | None] = deque()  # log-weights, None for an unweighted knapsack
        self._told: list[tuple[FloatArray, Evaluation]] = []
        self._cma = self._fresh()

    def ask(self) -> Ask:
        """The unweighted knapsack at each target of the lattice, where no seed is it; then weighted ones."""
        while self._unweighted:
            policy = self._solved(self._unweighted.popleft(), None)
            if policy not in self._seen:
                return self._asking(policy, None)
            if policy in self._known:
                self._refer(self._known[policy])
        for _ in range(TRIES):
            weights = np.asarray(self._cma.ask(), dtype=np.float64)
            policy = self._solved(float(self._rng.choice(self._targets)), weights)
            if policy not in self._seen:
                break
        return self._asking(policy, weights)

    def tell(self, evaluation: Evaluation) -> None:
        """Remember the unweighted ones as what to beat; hand the others to CMA-ES, a generation at a time."""
        weights = self._asked.popleft()
        if weights is None:
            self._refer(evaluation)
            return
        self._told.append((weights, evaluation))
        if len(self._told) == self._cma.population_size:
            generation, self._told = self._told, []
            self._cma.tell([(w, v) for (w, _), v in zip(generation, self._values(generation), strict=True)])
            if self._cma.should_stop():  # its spread is spent: start anew
                self._cma = self._fresh()

    def _asking(self, policy: Policy, weights: FloatArray | None) -> Ask:
        self._seen.add(policy)
        self._asked.append(weights)
        return Ask(policy, self._problem.tier)

    def _solved(self, target: float, weights: FloatArray | None) -> Policy:
        """The knapsack at `target` with log-weights [groups] on the penalties."""
        limits = {**self._problem.budget.limits, self._problem.budget.cost: target}
        log_weights = np.zeros(len(self._penalties)) if weights is None else weights[: len(self._penalties)]
        weighted = [p * w for p, w in zip(self._penalties, np.exp(log_weights), strict=True)]
        positions: IntArray = self._allocator.solve(weighted, limits)
        return self._codec.policy(positions)

    def _refer(self, evaluation: Evaluation) -> None:
        if evaluation.ok:
            self._reference[evaluation.costs[self._problem.budget.cost]] = self._log(evaluation.loss)

    def _values(self, generation: list[tuple[FloatArray, Evaluation]]) -> list[float]:
        """Log losses above the unweighted knapsack's; a failure is a little worse than the worst that did not fail."""
        costs = sorted(self._reference)
        known = [self._reference[c] for c in costs]
        values = []
        for _, e in generation:
            expected = float(np.interp(e.costs[self._problem.budget.cost], costs, known)) if e.ok and costs else 0.0
            values.append(self._log(e.loss) - expected if e.ok else np.inf)
        worst = max((v for v in values if np.isfinite(v)), default=0.0)
        return [v if np.isfinite(v) else worst + 1.0 for v in values]

    def _fresh(self) -> SepCMA:
        n = max(2, len(self._penalties))  # CMA-ES knows no problem of one dimension
        bounds = np.tile([-self._reach, self._reach], (n, 1))
        seed = int(self._rng.integers(2**31 - 1))
        return SepCMA(np.zeros(n), self._sigma, bounds=bounds, seed=seed)
