"""Whether a loss can tell candidates apart: a search that follows one that does not rise with pruning finds chance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scipy.stats import spearmanr

from autoprune.allocation.loss_scale import LEAST_LOSS
from autoprune.errors import RunError
from autoprune.evaluation import Evaluation
from autoprune.policy import Policy
from autoprune.protocols import Problem
from autoprune.run.constraints import Constraint
from autoprune.structure import Structure

ENOUGH = 12
"""Policies from which an order of losses that is no better than chance means something."""
LOOKED_AGAIN = 2 * ENOUGH
"""Answers of a search, partial ones included, after which it is asked again."""
FEW = 4
WIDE = 0.15
"""Range of the cost over which every loss that fits its outputs must rise."""
SAME = 1e-6


def check_telling(evaluations: Iterable[Evaluation], problem: Problem, loss: str, searched: bool = False) -> None:
    """RunError where the search minimises a loss that says nothing of the policies that are known."""
    if problem.logarithmic and (reason := cannot_tell(evaluations, problem.budget.cost, loss, searched)):
        raise RunError(reason)


def cannot_tell(evaluations: Iterable[Evaluation], cost: str, loss: str, searched: bool = False) -> str | None:
    """Why `loss` cannot tell the pruned policies of `evaluations` apart, or None where it can or too few are known.

    It cannot where all values are equal, or where, over a wide range of `cost`, they do not rise as the cost falls; a
    sampler that has `searched` may have found good narrow policies before good wide ones.
    """
    seen = {e.ask.policy: e for e in evaluations if e.ok and e.ask.fraction == 1.0 and e.costs[cost] < 1.0}
    values, costs = [e.loss for e in seen.values()], [e.costs[cost] for e in seen.values()]
    if len(values) < FEW or max(costs) - min(costs) < WIDE:
        return None
    low, high = min(values), max(values)
    what = f"the loss {loss} cannot tell candidates apart: on the first {len(values)} policies, {cost} from "
    what += f"{max(costs):.2f} down to {min(costs):.2f} of dense, it "
    advice = "its front would be chance, so the search stops; see objectives.loss and the task's outputs and classes"
    if high <= LEAST_LOSS or high - low <= SAME * abs(high):
        return f"{what}is {high:.3g} each time; {advice}"
    if not searched and len(values) >= ENOUGH and float(spearmanr(costs, values).statistic) >= 0.0:
        return f"{what}does not rise with pruning (from {low:.3g} to {high:.3g} in no order); {advice}"
    return None


def dense_misses(seeds: Iterable[Evaluation], structure: Structure, constraints: Sequence[Constraint]) -> str:
    """What to say before the budget is spent where the dense model itself misses a constraint."""
    dense = Policy.dense(structure)
    own = next((e.metrics for e in seeds if e.ok and e.ask.policy == dense), {})
    missed = [f"{c}, of which it has {own[c.metric]:.4g}" for c in constraints if c.miss(own) > 0]
    return f"on the fitness samples the dense model itself misses {' and '.join(missed)}" if missed else ""
