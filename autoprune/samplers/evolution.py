"""Pareto-archive evolution: elites over the whole budget range, budget-neutral exchanges, racing on few samples.

Of many children one is asked: that of which a Gaussian process, fitted to what has been evaluated, expects the most.
What the sensitivity table predicts is the mean that it starts from, where there is a table.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoprune.allocation.budget import Projector, lattice, reachable
from autoprune.allocation.knapsack import Allocator, penalties
from autoprune.allocation.loss_scale import loss_scale
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.policy import IntArray, Policy
from autoprune.protocols import FloatArray, Problem
from autoprune.samplers._expectation import Expectation, Round

TARGETS = 33  # over the budget range: a front of few points leaves steps in the hypervolume
TRIES = 32  # children drawn before a duplicate is let through: a tiny space may have no new one
EXPLORED = 16  # half of the first children are drawn from the whole space, an ever smaller share of later ones
POOL = 8  # parents are drawn among this many, the better ones more often
MOVED = 4096  # elites at other budgets that are remembered
ARCHIVE = 400  # elites kept before the worse half goes
FAR = 0.5  # log loss that a parent must be better by to be taken from the other end of the budget range
PAIRS = 4  # candidates that go all the way unjudged, to learn what few samples say about all
PARENTS = 2  # of the children drawn for each that is asked
LITTER = 64  # children drawn of each parent
HOPE = 1.5  # standard deviations, at most, that a child may be better than expected
ALLOCATED = 0.1  # share of the litters with a parent from the knapsack
WOBBLE = 0.25  # spread of the log weights that a knapsack child is drawn with
REACH = 0.08  # how far off, in budget ranges, such a pair still says something
# A refit looks at all statistics samples whatever the fraction, so that many short rounds cost more than they save.
FRACTIONS = {"stitch": (0.125, 0.5, 1.0), "refit": (0.25, 1.0), "tune": (1.0,)}


@dataclass(frozen=True)
class _Elite:
    positions: IntArray
    costs: FloatArray  # the budget's cost first, then the other objectives
    value: float  # log loss on all samples

    @property
    def cost(self) -> float:
        return float(self.costs[0])


class Evolution:
    """After ALGORITHMS 6.3 and EvoPress (Sieberling et al. 2024): elitist, seeded by `problem.seeds`, no duplicates.

    Each ask is a child of an elite, on a budget from a lattice over the range. It is asked at the first of
    `fractions` (by default what suits the tier), and again at later ones unless it is confidently worse than the
    front, or better at once. With several objectives a candidate is held against the elites that cost no more in any.
    """

    uses_table = True
    uses_seeds = True

    def __init__(self, problem: Problem, rng: np.random.Generator, *, fractions: Sequence[float] | None = None) -> None:
        chosen = FRACTIONS[problem.tier] if fractions is None else fractions
        self._fractions = tuple(float(f) for f in chosen)
        if list(self._fractions) != sorted(set(self._fractions)) or self._fractions[-1:] != (1.0,):
            raise InputError(f"search.options.fractions must ascend to 1, not {list(chosen)}")
        budget = problem.budget
        self._problem = problem
        self._rng = rng
        self._projector = Projector(problem.structure, problem.costs)
        self._projector.check({**budget.limits, budget.cost: budget.low})
        self._targets = lattice(budget, TARGETS)
        self._log = loss_scale(problem)
        self._names = (budget.cost, *(c for c in problem.objectives if c != budget.cost))
        self._least = {c: reachable(problem.structure, problem.costs[c])[0] for c in self._names[1:]}
        self._penalties = penalties(problem) if problem.table is not None else None
        self._allocator = Allocator(problem.structure, problem.costs)
        self._elites: list[_Elite] = []
        self._at_budget: dict[tuple[bytes, tuple[tuple[str, float], ...]], IntArray] = {}
        self._front: tuple[FloatArray, FloatArray] | None = None
        self._seen: set[Policy] = set()
        self._crowned: set[Policy] = set()
        self._repeats: Counter[Policy] = Counter()
        self._rounds = [Round(REACH * max(budget.high - budget.low, 1e-9)) for _ in self._fractions[:-1]]
        self._expectation = Expectation(self._projector.codec, self._penalties, self._log.logarithmic, self._rounds)
        self._values: dict[Policy, dict[int, float]] = {}  # of those still in the race, by round
        self._held: deque[tuple[Policy, int, FloatArray]] = deque()  # wait until their round has its first pairs
        self._promoted: deque[tuple[Policy, int]] = deque()
        for seed in problem.seeds:
            self.know(seed)

    def know(self, evaluation: Evaluation) -> None:
        """Take in what was evaluated elsewhere, as a seed."""
        self._seen.add(evaluation.ask.policy)
        if evaluation.ok and evaluation.ask.fraction == 1.0 and evaluation.ask.tier == self._problem.tier:
            self._learn(evaluation, len(self._rounds))
            self._crown(evaluation)

    def ask(self) -> Ask:
        """The next round of a promoted candidate, else a new child in its first round."""
        if self._promoted:
            policy, race_round = self._promoted.popleft()
        else:
            policy, race_round = self._child(), 0
            if policy in self._seen:  # nothing new is left: a full one costs nothing, or judges what few samples did
                self._repeats[policy] += 1
                return Ask(policy, self._problem.tier, self._fractions[-1])
            self._seen.add(policy)
        return Ask(policy, self._problem.tier, self._fractions[race_round])

    def tell(self, evaluation: Evaluation) -> None:
        """Judge a candidate after a round; crown it after the last."""
        policy, race_round = evaluation.ask.policy, self._fractions.index(evaluation.ask.fraction)
        final = race_round == len(self._fractions) - 1
        if final and self._repeats[policy]:  # it takes no part in the race
            self._repeats[policy] -= 1
            if evaluation.ok and policy not in self._crowned:
                self._learn(evaluation, race_round)
                self._crown(evaluation)
            return
        values = self._values.pop(policy, {})
        if evaluation.ok:
            values[race_round] = value = self._log(evaluation.loss)
            self._learn(evaluation, race_round)
            if final:
                self._crown(evaluation)
            else:
                self._values[policy] = values
                self._held.append((policy, race_round, np.array([evaluation.costs[c] for c in self._names])))
        if final:
            for earlier in values.keys() - {race_round}:
                self._rounds[earlier].unjudged -= 1
                if evaluation.ok and not evaluation.penalised:  # few samples know no penalty
                    self._rounds[earlier].learn(evaluation.costs[self._names[0]], values[earlier] - value)
        for _ in range(len(self._held)):
            self._judge(*self._held.popleft())

    def _judge(self, policy: Policy, race_round: int, costs: FloatArray) -> None:
        """Promote, drop, or hold back until the round has been calibrated."""
        state, last = self._rounds[race_round], len(self._fractions) - 1
        if len(state.errors) < PAIRS or self._front is None:
            if len(state.errors) + state.unjudged >= PAIRS and self._front is not None:
                self._held.append((policy, race_round, costs))
                return
            behind, doubt = -np.inf, 0.0
        else:
            bias, doubts = state.expected(costs[:1])
            behind, doubt = self._values[policy][race_round] - float(bias[0]) - self._best_at(costs), float(doubts[0])
        if behind > doubt:
            del self._values[policy]
            return
        following = last if behind < -doubt else race_round + 1
        self._promoted.append((policy, following))
        if following == last:
            for earlier in self._values[policy]:
                self._rounds[earlier].unjudged += 1

    def _learn(self, evaluation: Evaluation, race_round: int) -> None:
        cost = float(evaluation.costs[self._names[0]])
        self._expectation.learn(evaluation.ask.policy, cost, self._log(evaluation.loss), race_round)

    def _child(self) -> Policy:
        """A new policy: the most hoped-of of many near the elites at a target, now and then one from anywhere."""
        codec = self._projector.codec
        for attempt in range(TRIES):
            target = float(self._rng.choice(self._targets))
            limits = self._limits(target)
            exploring = self._rng.random() < EXPLORED / (2 * (EXPLORED + len(self._seen)))
            if exploring or attempt >= TRIES // 2 or not self._elites:
                positions = self._projector.positions(self._rng.random(len(codec.dense)), limits)
            else:
                positions = self._most_hoped_of(self._litter(target, limits), limits)
            policy = codec.policy(positions)
            if policy not in self._seen:
                break
        return policy

    def _limits(self, target: float) -> dict[str, float]:
        """The target, the job's limits and, with several objectives, now and then a limit on another one."""
        budget = self._problem.budget
        limits = {**budget.limits, budget.cost: target}
        others = [c for c in self._names[1:] if self._problem.costs[c].monotone and c not in limits]
        if others and self._elites and self._rng.random() < 0.5:
            name = others[int(self._rng.integers(len(others)))]
            elite = self._elites[int(self._rng.integers(len(self._elites)))]
            limit = float(elite.costs[self._names.index(name)]) * self._rng.uniform(0.8, 1.0)
            if limit > self._least[name]:
                limits[name] = limit
        return limits

    def _litter(self, target: float, limits: dict[str, float]) -> IntArray:
        """Children at the target [n, groups]: of elites moved there, of a difference of two, of the knapsack."""
        starts = [self._moved(self._parent(target), limits) for _ in range(PARENTS)]
        starts[-1] = self._difference(starts[-1], limits)
        if self._penalties is not None and self._rng.random() < ALLOCATED:
            starts[0] = self._allocated(self._penalties, target, limits)
        children = np.concatenate([starts, *(self._exchanged(start) for start in starts)])
        return children[self._projector.fits(children, limits)]

    def _most_hoped_of(self, children: IntArray, limits: dict[str, float]) -> IntArray:
        """The new child with the least expected loss, less some of what is uncertain of it; what is left is filled."""
        codec = self._projector.codec
        children = children[self._rng.permutation(len(children))]
        assert self._front is not None  # there are elites, or there would be no children
        predicted = self._expectation.predict(children, self._front)
        if predicted is not None:
            mean, deviation = predicted
            hoped = mean - self._rng.uniform(0.0, HOPE) * deviation
            # rounded, as a run must go on alike on a machine whose arithmetic differs in the last bits
            children = children[np.argsort(hoped.round(6), kind="stable")]
        fresh = (c for c in children if codec.policy(c) not in self._seen)
        return self._projector.give_back(next(fresh, children[0]), limits)

    def _allocated(self, table: Sequence[FloatArray], target: float, limits: dict[str, float]) -> IntArray:
        """The knapsack of the table with its groups' weights drawn around 1."""
        noise = np.exp(self._rng.normal(0.0, WOBBLE, size=len(table)))
        return self._allocator.solve([n * p for n, p in zip(noise, table, strict=True)], limits)

    def _parent(self, target: float) -> _Elite:
        """An elite near the front and near the target; the better, the likelier."""
        costs = np.array([e.cost for e in self._elites])
        behind = self._all_behind()
        span = max(self._problem.budget.high - self._problem.budget.low, 1e-9)
        order = np.argsort(behind + FAR * np.abs(costs - target) / span, kind="stable")
        rank = int(min(self._rng.integers(min(POOL, len(order)), size=2)))
        return self._elites[int(order[rank])]

    def _moved(self, elite: _Elite, limits: dict[str, float]) -> IntArray:
        """The elite at another budget: a step along the front; it stays where it is where its budget is the same."""
        codec, key = self._projector.codec, (elite.positions.tobytes(), tuple(limits.items()))
        if key not in self._at_budget:
            if len(self._at_budget) >= MOVED:
                self._at_budget.clear()
            self._at_budget[key] = self._projector.positions(codec.ratios(codec.widths(elite.positions)), limits)
        return self._at_budget[key]

    def _difference(self, positions: IntArray, limits: dict[str, float]) -> IntArray:
        """Go on in the direction in which one elite is better than another (differential evolution, Storn 1997)."""
        codec = self._projector.codec
        pair = self._rng.choice(len(self._elites), size=2)
        elites = sorted((self._elites[int(i)] for i in pair), key=self._behind)
        better, worse = (codec.ratios(codec.widths(e.positions)) for e in elites)
        taking_part = self._rng.random(len(positions)) < self._rng.choice([0.5, 1.0])
        step = self._rng.uniform(0.2, 1.0) * taking_part * (better - worse)
        return self._projector.positions(codec.ratios(codec.widths(positions)) + step, limits)

    def _behind(self, elite: _Elite) -> float:
        """Log loss above the front at the elite's costs."""
        return elite.value - self._best_at(elite.costs)

    def _all_behind(self) -> FloatArray:
        """`_behind` of all elites [n]."""
        if len(self._names) > 1:
            return np.array([self._behind(e) for e in self._elites])
        assert self._front is not None
        return np.array([e.value for e in self._elites]) - np.interp([e.cost for e in self._elites], *self._front)

    def _best_at(self, costs: FloatArray) -> float:
        """The log loss to beat: on the front at this cost; with several, of the elites that cost no more in any."""
        assert self._front is not None
        if len(self._names) == 1:
            return float(np.interp(costs[0], *self._front))
        values = [e.value for e in self._elites if np.all(e.costs <= costs)]
        return min(values, default=np.inf)

    def _exchanged(self, start: IntArray) -> IntArray:
        """Children [LITTER, groups] that widen min(U{1..3}, U{1..3}) groups of `start` and narrow as many others."""
        last = self._projector.codec.last
        rank = self._rng.random((LITTER, len(last))).argsort(axis=1)
        wide, narrow = self._rng.integers(1, 4, size=(2, 2, LITTER, 1)).min(axis=0)
        sign = np.where(rank < wide, 1, np.where(rank >= len(last) - narrow, -1, 0))
        # 5 to 50 % of the grid and at least one cell, small steps likelier
        stride = np.maximum(1, np.rint(last * 10 ** self._rng.uniform(-1.3, -0.3, size=rank.shape)))
        return np.asarray(np.clip(start + sign * stride.astype(np.int64), 0, last))

    def _crown(self, evaluation: Evaluation) -> None:
        """Take a candidate into the archive, once, and redraw the front."""
        if evaluation.ask.policy in self._crowned:
            return
        self._crowned.add(evaluation.ask.policy)
        codec = self._projector.codec
        positions = codec.positions(evaluation.ask.policy.array(codec.structure))
        costs = np.array([evaluation.costs[c] for c in self._names])
        self._elites.append(_Elite(positions, costs, self._log(evaluation.loss)))
        ranked = sorted(self._elites, key=lambda e: (e.cost, e.value))
        best = np.minimum.accumulate([e.value for e in ranked])
        front = [i for i, e in enumerate(ranked) if e.value == best[i] and (i == 0 or best[i] < best[i - 1])]
        self._front = np.array([ranked[i].cost for i in front]), best[front]
        if len(self._elites) > ARCHIVE:
            keep = np.sort(np.argsort(self._all_behind(), kind="stable")[: ARCHIVE // 2])
            self._elites = [self._elites[i] for i in keep]
