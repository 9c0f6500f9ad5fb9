"""Budgets are met exactly: project any point of the unit cube onto the widths that satisfy all limits, to the cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

import numpy as np
import numpy.typing as npt

from autoprune.codec import Codec
from autoprune.errors import InputError, did_you_mean
from autoprune.matrices import WEIGHT
from autoprune.policy import IntArray, Policy
from autoprune.protocols import Budget, Cost, FloatArray
from autoprune.structure import Structure

Limits = Mapping[str, float]
"""Upper bounds by cost name, as ratios to dense."""

SLACK = 1e-12  # a cost that equals its limit holds, whatever the last bit says
AHEAD = 8  # cells of one group that are handed out in one round
LATTICE = 9  # targets spread over the budget range, for a searcher that pays for each
PROBES = 15  # candidates tried at once where one is bisected for: numpy's calls cost more than their work
SCANNED = 64  # shifts tried where a cost that is not monotone breaks its limit


def lattice(budget: Budget, n: int = LATTICE) -> FloatArray:
    """Targets to draw from: `n` evenly over the budget range; on top the asked ones, each at least once.

    Together the asked ones come two thirds as often as the others, or once each where they are many.
    """
    at = [t for t in budget.at if budget.low <= t <= budget.high]
    times = max(1, round(2 * n / (3 * len(at)))) if at else 0
    return np.array([*np.linspace(budget.low, budget.high, n), *(at * times)])


def project(
    structure: Structure,
    costs: Mapping[str, Cost],
    raw: npt.ArrayLike,
    limits: Limits,
    scores: Mapping[str, FloatArray] | None = None,
) -> Policy:
    """The policy nearest to `raw` (ratios [groups]) up to one common shift, with no room for one more cell.

    Raises:
        InputError: a limit lies below what the grids can reach (the message names the range).
    """
    return Projector(structure, costs, scores).project(raw, limits)


def reachable(structure: Structure, cost: Cost) -> tuple[float, float]:
    """(low, high): `cost` of the narrowest widths and of the dense ones, as ratios to dense."""
    codec = Codec(structure)
    return float(cost(codec.widths(np.zeros_like(codec.last)))), float(cost(codec.dense))


class Projector:
    """`project` for many calls: holds what depends on the structure, the costs and the scores alone.

    With `scores` (group -> score of each atom) cells go back by their predicted gain, the scores of the atoms in
    it over the group's mean, per cost; without, to the group that a further shift would widen next.
    """

    def __init__(
        self, structure: Structure, costs: Mapping[str, Cost], scores: Mapping[str, FloatArray] | None = None
    ) -> None:
        self.codec = Codec(structure)
        self.costs = costs
        self._reached: dict[str, tuple[float, float]] = {}  # as asked for: a check comes with every projection
        self._dense_of_cell = np.repeat(self.codec.dense, self.codec.last + 1).astype(np.float64)
        self._group_of_cell = np.repeat(np.arange(len(structure)), self.codec.last + 1)
        self._gains = _gains(structure, scores) if scores is not None else None
        self._first_cell = np.concatenate([[0], np.cumsum(self.codec.last + 1)[:-1]]).astype(np.int64)
        self._ratio_of_cell = np.array([w for g in structure.groups for w in g.grid]) / self._dense_of_cell

    def project(self, raw: npt.ArrayLike, limits: Limits) -> Policy:
        """Ratios [groups] -> policy; see the function of the same name."""
        return self.codec.policy(self.positions(raw, limits))

    def positions(self, raw: npt.ArrayLike, limits: Limits) -> IntArray:
        """Ratios [groups] -> grid positions: the largest common shift that fits, then single cells."""
        ratios = np.clip(np.asarray(raw, dtype=np.float64), 0.0, 1.0)
        if ratios.shape != self.codec.dense.shape:
            raise InputError(f"raw must hold one ratio for each of {len(self.codec.dense)} groups, not {ratios.shape}")
        # widths change only where ratio + shift meets a grid width, so these shifts are all there are
        shifts = np.unique(self._ratio_of_cell - ratios[self._group_of_cell])
        start = self.widest(len(shifts), lambda i: self.codec.floor(ratios + shifts[i][..., None]), limits)
        return self.give_back(start, limits, ratios)

    def widest(self, n: int, positions_at: Callable[[IntArray], IntArray], limits: Limits) -> IntArray:
        """The last of `n` ever wider candidates that fits; `positions_at` maps indices [k] to positions [k, groups]."""
        self.check(limits)
        bisected = {name: limit for name, limit in limits.items() if self.costs[name].monotone}
        low = self._last_fitting(0, n, positions_at, bisected)
        best = positions_at(np.array([low]))[0]
        if not self.fits(best[None], bisected)[0]:
            best = np.zeros_like(best)
        if len(bisected) == len(limits) or self.fits(best[None], limits)[0]:
            return np.asarray(best)
        scanned = positions_at(np.unique(np.linspace(0, low, SCANNED).astype(np.int64)))
        fitting = np.flatnonzero(self.fits(scanned, limits))
        if not len(fitting):
            raise InputError(f"no widths within {dict(limits)} were found: {self._ranges(limits)}")
        return np.asarray(scanned[fitting[-1]])

    def give_back(self, positions: IntArray, limits: Limits, raw: FloatArray | None = None) -> IntArray:
        """Widen single groups, one cell at a time, until none can take one more without breaking a limit.

        `positions` must fit. `raw` is the wish that decides who comes first where there are no scores.
        """
        wish = self.codec.ratios(self.codec.widths(positions)) if raw is None else raw
        alive = np.flatnonzero(positions < self.codec.last)
        while len(alive):
            # a monotone cost only grows: who does not fit now never will, so each round drops somebody or advances
            single = np.repeat(positions[None], len(alive), axis=0)
            single[np.arange(len(alive)), alive] += 1
            ratios = self._ratios(single, limits)
            fits = self._within(ratios, limits)
            alive, ratios = alive[fits], {name: r[fits] for name, r in ratios.items()}
            if len(alive):
                positions = self._fill(positions, self._order(positions, alive, ratios, wish, limits), limits)
            alive = alive[positions[alive] < self.codec.last[alive]]
        return positions

    def _fill(self, positions: IntArray, order: IntArray, limits: Limits) -> IntArray:
        """Widen the groups in `order` by one cell each (one may come again) as far as that fits; the first one does."""

        def after(counts: IntArray) -> IntArray:
            more = np.stack([np.bincount(order[:n], minlength=len(positions)) for n in counts])
            return np.asarray(positions + more)

        return np.asarray(after(np.array([self._last_fitting(1, len(order) + 1, after, limits)]))[0])

    def _last_fitting(self, low: int, high: int, positions_at: Callable[[IntArray], IntArray], limits: Limits) -> int:
        """The last index from `low` (taken to fit) to before `high` that fits, where all after one that does not fail.

        `positions_at` is as in `widest`.
        """
        while high - low > 1:
            step = -(-(high - low) // (PROBES + 1))
            probes = np.arange(low + step, high, step)
            fits = self.fits(positions_at(probes), limits)
            n_fitting = len(probes) if fits.all() else int(np.argmin(fits))
            low, high = low + n_fitting * step, min(high, low + (n_fitting + 1) * step)
        return low

    def fits(self, positions: IntArray, limits: Limits) -> npt.NDArray[np.bool_]:
        """Positions [k, groups] -> whether all limits hold [k]."""
        if not limits:
            return np.ones(len(positions), dtype=np.bool_)
        return self._within(self._ratios(positions, limits), limits)

    def check(self, limits: Limits) -> None:
        """Raise InputError where there is no limit, a cost is unknown or a limit is below the reachable range."""
        if not limits:
            raise InputError("a budget needs at least one cost to limit, such as macs=0.5")
        for name, limit in limits.items():
            if name not in self.costs:
                raise InputError(f"unknown cost {name!r}; {did_you_mean(name, self.costs)}")
            if self.costs[name].monotone and self._reach(name)[0] > limit + SLACK:
                narrows = any(g.narrows for g in self.codec.structure)
                hint = "ask for more" + (", or allow narrower groups (space.max_sparsity)" if narrows else "")
                raise InputError(f"budget {name}={limit:g} is out of reach: {self._ranges({name: limit})}; {hint}")

    def _reach(self, name: str) -> tuple[float, float]:
        if name not in self._reached:
            self._reached[name] = reachable(self.codec.structure, self.costs[name])
        return self._reached[name]

    def _ranges(self, limits: Limits) -> str:
        ranges = {name: self._reach(name) for name in limits}
        return ", ".join(
            f"{n} can be between {_up(low)} and {high:.4g} of dense"
            if self.costs[n].monotone
            else f"{n} is {low:.4g} of dense at the narrowest widths, and not monotone"
            for n, (low, high) in ranges.items()
        )

    def _ratios(self, positions: IntArray, limits: Limits) -> dict[str, FloatArray]:
        widths = self.codec.widths(positions)
        return {name: self.costs[name](widths) for name in limits}

    def _within(self, ratios: Mapping[str, FloatArray], limits: Limits) -> npt.NDArray[np.bool_]:
        held = (ratios[name] <= limit + SLACK for name, limit in limits.items())
        return reduce(np.logical_and, held)

    def _order(
        self, positions: IntArray, alive: IntArray, ratios: Mapping[str, FloatArray], wish: FloatArray, limits: Limits
    ) -> IntArray:
        """The groups in `alive`, each as often as it has next cells (`AHEAD` at most), the best cell first."""
        step = np.arange(AHEAD)
        cells = (self._first_cell[alive] + positions[alive])[:, None] + step
        exists = step < (self.codec.last[alive] - positions[alive])[:, None]
        cells = np.where(exists, cells, 0)
        if self._gains is None:
            key = self._ratio_of_cell[cells + 1] - wish[alive][:, None]
        else:
            here = self._ratios(positions[None], limits)
            price = np.maximum(np.sum([ratios[name] - here[name] for name in limits], axis=0), 1e-15)
            key = -self._gains[cells] / price[:, None]
        key = np.maximum.accumulate(np.where(exists, key, np.inf), axis=1)  # a cell never comes before the one below it
        order = np.argsort(key, axis=None, kind="stable")[: int(exists.sum())]
        return np.asarray(alive[order // AHEAD])


def normalised(structure: Structure, scores: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Scores over their group's mean, so that groups compare; a group without any score gets ones.

    Blocks, which are one atom each, are taken as one group, and so are precisions, whose bits go together, and the
    weights of all matrices, which compare as they are. Scores of weights, millions of them, keep their type.

    Raises:
        InputError: a group has no scores, too few of them, or one that is not finite.
    """
    given: dict[str, FloatArray] = {}
    for group in structure.groups:
        values = np.asarray(scores.get(group.name, ()), dtype=None if group.kind == WEIGHT else np.float64)
        if values.shape != (group.width,) or not np.isfinite(values).all():
            raise InputError(f"group {group.name!r} needs {group.width} finite scores, not shape {values.shape}")
        given[group.name] = values
    together = {kind: [given[g.name] for g in structure.groups if g.kind == kind] for kind in ("block", "bits")}
    common = {kind: float(np.mean(np.concatenate(some))) for kind, some in together.items() if some}
    weights = [given[g.name] for g in structure.groups if g.kind == WEIGHT]
    if weights:
        common[WEIGHT] = sum(float(np.sum(v, dtype=np.float64)) for v in weights) / sum(v.size for v in weights)
    result: dict[str, FloatArray] = {}
    for group in structure.groups:
        values = given[group.name]
        mean = common[group.kind] if group.kind in common else float(np.mean(values))
        result[group.name] = values / mean if mean > 0 else np.ones_like(values)
    return result


def _gains(structure: Structure, scores: Mapping[str, FloatArray]) -> FloatArray:
    """For every cell of every grid, flat: the scores of the atoms that the step to the next width brings back."""
    parts: list[FloatArray] = []
    for group, values in zip(structure.groups, normalised(structure, scores).values(), strict=True):
        if group.kind == WEIGHT:  # a sum between each two widths, and no array of all of them
            starts = group.width - np.array(group.grid[::-1])
            sums = np.add.reduceat(np.sort(values), starts, dtype=np.float64)
            parts.append(np.append(sums[:-1][::-1], 0.0))
        else:
            kept = np.concatenate([[0.0], np.cumsum(np.sort(values)[::-1])])[list(group.grid)]
            parts.append(np.append(np.diff(kept), 0.0))
    return np.concatenate(parts)


def _up(ratio: float) -> str:
    """Four digits, rounded up, so that the range in a message can be asked for."""
    return f"{np.ceil(ratio * 1e4) / 1e4:g}"
