"""What evolution has learnt: how far few samples mislead, and which children are worth an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from autoprune.allocation.knapsack import predicted_loss
from autoprune.codec import Codec
from autoprune.policy import IntArray, Policy
from autoprune.protocols import FloatArray
from autoprune.samplers._surrogate import Surrogate

LEARNT = 192  # candidates that the surrogate is fitted to, those nearest to the front
LEAST_LEARNT = 8  # below it nothing can be said of the children
DOUBT = 0.2  # what is assumed, before there are pairs, to be the standard error of a log loss on few samples


@dataclass
class Round:
    """What one round of the race (one fraction) has taught: log loss on it less log loss on all samples.

    Policies of like cost err alike, by more than they differ: an error counts less the farther off it was made.
    """

    reach: float  # of an error, in the budget's cost
    at: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    unjudged: int = 0  # candidates on their way to be such a pair

    def learn(self, cost: float, error: float) -> None:
        """Take the error of a candidate of this cost that was measured on all samples too."""
        self.at.append(cost)
        self.errors.append(error)

    def expected(self, costs: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(bias, standard error) of log losses that were measured in this round at `costs` [n]."""
        errors = np.array(self.errors)
        usual = float(np.median(errors)) if len(errors) else 0.0
        weights = np.exp(-0.5 * ((np.array(self.at) - costs[:, None]) / self.reach) ** 2)
        near = weights.sum(axis=1)
        bias = (usual + weights @ errors) / (1.0 + near)
        squares = DOUBT**2 + np.sum(weights * (errors - bias[:, None]) ** 2, axis=1)
        return bias, np.sqrt(squares / (1.0 + near))


@dataclass(frozen=True)
class _Evidence:
    """The last that was measured of a candidate: its log loss in a round of the race."""

    positions: IntArray
    cost: float
    value: float
    race_round: int


class Expectation:
    """A surrogate of the log loss less what the sensitivity table predicts, if there is a table.

    `penalties` are the table's, as `allocation.penalties` gives them; with `logarithmic` values are log losses.
    `rounds` are those of the race, which correct what was measured on few samples.
    """

    def __init__(
        self, codec: Codec, penalties: Sequence[FloatArray] | None, logarithmic: bool, rounds: Sequence[Round]
    ) -> None:
        self._codec, self._penalties, self._logarithmic, self._rounds = codec, penalties, logarithmic, rounds
        self._least = min((float(p[p > 0].min()) for p in penalties or () if np.any(p > 0)), default=1.0)
        self._evidence: dict[Policy, _Evidence] = {}
        self._surrogate: Surrogate | None = None

    def learn(self, policy: Policy, cost: float, value: float, race_round: int) -> None:
        """Keep what was measured; a later round replaces an earlier one.

        Not of the dense policy: its loss may be 0, and no logarithm tells how near another one is to that.
        """
        positions = self._codec.positions(policy.array(self._codec.structure))
        if np.any(positions < self._codec.last):
            self._evidence[policy] = _Evidence(positions, cost, value, race_round)
            self._surrogate = None

    def predict(
        self, positions: IntArray, front: tuple[FloatArray, FloatArray]
    ) -> tuple[FloatArray, FloatArray] | None:
        """Positions [n, groups] -> (value [n], standard deviation [n]); None as long as too little is known.

        `front` is (costs, values) of the front so far: what lies near it counts.
        """
        if len(self._evidence) < LEAST_LEARNT:
            return None
        if self._surrogate is None:
            self._surrogate = self._fitted(front)
        mean, deviation = self._surrogate.predict(self._ratios(positions))
        return mean + self._predicted(positions), deviation

    def _fitted(self, front: tuple[FloatArray, FloatArray]) -> Surrogate:
        known = list(self._evidence.values())
        values, costs = np.array([e.value for e in known]), np.array([e.cost for e in known])
        noises, rounds = np.zeros(len(known)), np.array([e.race_round for e in known])
        for i, state in enumerate(self._rounds):
            bias, noises[rounds == i] = state.expected(costs[rounds == i])
            values[rounds == i] -= bias
        near = np.argsort(values - np.interp(costs, *front), kind="stable")[:LEARNT]
        positions = np.stack([known[i].positions for i in near])
        return Surrogate(self._ratios(positions), values[near] - self._predicted(positions), noises[near])

    def _predicted(self, positions: IntArray) -> FloatArray:
        """The table's prediction in the unit of the values [n]; zeros without a table."""
        if self._penalties is None:
            return np.zeros(len(positions))
        losses = predicted_loss(self._penalties, positions)
        return np.asarray(np.log(np.maximum(losses, self._least))) if self._logarithmic else losses

    def _ratios(self, positions: IntArray) -> FloatArray:
        return self._codec.ratios(self._codec.widths(positions))
