"""The Pareto front of evaluations, its hypervolume, and thinning it: pure functions."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from heapq import heapify, heappop, heapreplace

import numpy as np
import numpy.typing as npt

from autoprune.evaluation import Evaluation


def pareto_front(evaluations: Iterable[Evaluation], costs: Sequence[str]) -> tuple[Evaluation, ...]:
    """Evaluations that no other beats in loss and all `costs`, ascending in the first cost; failed ones are left out.

    Of equals (the same loss and costs) the first told stays, so the front does not depend on chance.
    """
    import moocore

    alive = [e for e in evaluations if e.ok]
    if not alive:
        return ()
    values = np.array([[e.costs[c] for c in costs] + [e.loss] for e in alive])
    standing = moocore.is_nondominated(values, keep_weakly=False)  # of equals the first
    return tuple(alive[i] for i in np.lexsort(values.T[::-1]) if standing[i])


def hypervolume(points: npt.NDArray[np.float64], reference: npt.NDArray[np.float64]) -> float:
    """Hypervolume dominated by `points` [n, d] (minimised) up to `reference` [d]; moocore (Fonseca et al. 2006)."""
    import moocore

    inside = points[np.all(points < reference, axis=1)] if len(points) else points
    return float(moocore.hypervolume(inside, ref=reference)) if len(inside) else 0.0


LEAST_LOSS, MOST_LOSS = 1e-6, 10.0


def reference_point(n_costs: int) -> tuple[float, ...]:
    """Where hypervolumes of fronts end: the dense model's cost in every cost, and the logarithm of a loss of 10."""
    return (*(1.0 for _ in range(n_costs)), math.log(MOST_LOSS))


def front_volume(points: Iterable[tuple[Sequence[float], float]], logarithmic: bool = True) -> float:
    """Hypervolume of (cost ratios, loss) up to `reference_point`; without `logarithmic` the loss counts as it is."""
    found = _objectives(points, logarithmic)
    return hypervolume(found, np.array(reference_point(found.shape[1] - 1))) if len(found) else 0.0


def thinned(
    front: Sequence[Evaluation], n: int, costs: Sequence[str], logarithmic: bool = True, spared: Collection[int] = ()
) -> list[Evaluation]:
    """At most `n` of a front, those at the indices `spared` among them: again and again the one of least volume goes.

    That is the one without which the hypervolume falls least (Bader & Zitzler 2011); points spread evenly
    would leave high steps where the loss falls steeply. Hypervolumes end at `reference_point`, or beyond the front
    where that reaches further.
    """
    if len(front) <= n:
        return list(front)
    points = _objectives([([e.costs[c] for c in costs], e.loss) for e in front], logarithmic)
    reference, worst = np.array(reference_point(len(costs))), points.max(axis=0)
    beyond = worst + np.maximum(np.ptp(points, axis=0), 1e-6) / 10
    reference = np.where(worst < reference, reference, beyond)
    left = list(range(len(front)))

    def added(index: int) -> float:
        others = [i for i in left if i != index]
        return hypervolume(points[left], reference) - hypervolume(points[others], reference)

    queue = [(added(i), i) for i in left if i not in spared]
    heapify(queue)
    while len(left) > max(n, len(spared)):
        index = queue[0][1]
        # moocore.hv_contributions takes 10 s for 600 points of five objectives, and each step would need it
        now = added(index)  # it only grows as others go, so what the rest added before is a lower bound
        heapreplace(queue, (now, index))
        if queue[0][1] == index:
            left.remove(heappop(queue)[1])
    return [front[i] for i in left]


def _objectives(points: Iterable[tuple[Sequence[float], float]], logarithmic: bool) -> npt.NDArray[np.float64]:
    """(cost ratios, loss) [points, costs + 1], the logarithm of the loss where that is asked for."""
    return np.array([[*costs, math.log(max(loss, LEAST_LOSS)) if logarithmic else loss] for costs, loss in points])
