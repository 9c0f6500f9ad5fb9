"""Widths from a sensitivity table: predicted losses, and their least sum within all limits (knapsack, Lagrangian)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from autoprune.allocation.budget import SLACK, Limits, Projector
from autoprune.allocation.cost_lines import CostLines, padded_grids
from autoprune.errors import InputError, did_you_mean
from autoprune.policy import IntArray
from autoprune.protocols import Cost, FloatArray, Problem
from autoprune.structure import Structure

ROUNDS = 12  # of coordinate descent at one price; it settles in two or three
STEPS = 18  # bisections of the price, each halving its logarithm's bracket; local repair does the rest
MIXES = 6  # mixtures of prices tried where several limits bind at once
MOVES = 128  # single-group moves of which all pairs are tried in one step of local repair
MOVES_EVALUATED = 40  # the same where each pair has to be evaluated
REPAIRS = 200  # steps of local repair at most; each lowers the predicted loss
STATES = 10_000  # of the dynamic programme; it prunes to far fewer, and above this it keeps the most promising ones
SWEEP = 96  # prices of a front, set where the costs of neighbours lie farthest apart
PRECISION = 1e-6  # prices nearer than this are one
TRUST = 1e-10  # predicted costs may be off by this; the cost itself has the last word


def penalties(problem: Problem, whom: str = "this search") -> tuple[FloatArray, ...]:
    """For each group, the predicted loss increase at every grid position: ascending width, never rising, last is 0.

    The table's losses, less the dense model's (0, or what `problem.table` or `problem.seeds` say, for metrics the
    least), as a running maximum from dense to narrow; between measured widths linear in the square root, and on with
    the last slope below the narrowest. `whom` needs them, for the message.

    Raises:
        InputError: there is no table, or it lacks a group.
    """
    table = problem.table
    if table is None:
        raise InputError(f"{whom} needs the sensitivity table: set evaluator.sensitivity to 2 or more")
    for name in problem.structure.names:
        if name not in table:
            raise InputError(f"the sensitivity table lacks group {name!r}; {did_you_mean(name, table)}")
    dense = _dense_loss(problem, table)
    finite = [v for row in table.values() for v in row.values() if np.isfinite(v)]
    worst = 10 * max([v - dense for v in finite], default=1.0)  # stands for a failed measurement
    return tuple(
        _curve(np.array(g.grid, dtype=np.float64), table[g.name], dense, worst) for g in problem.structure.groups
    )


def predicted_loss(penalties: Sequence[FloatArray], positions: IntArray) -> FloatArray:
    """The sum of the groups' penalties at grid positions [..., groups] -> [...]."""
    columns = [p[positions[..., i]] for i, p in enumerate(penalties)]
    return np.asarray(np.sum(columns, axis=0), dtype=np.float64)


class Allocator:
    """Least summed penalties within limits on costs that couple the groups (MACs are bilinear in neighbours' widths).

    A price on each limited cost turns the problem into single groups' choices, solved by coordinate descent with
    exact costs; the price is bisected until the limits hold; then pairs of single-group moves are exchanged until
    none helps. Where one cost is limited and adds up over the groups, a dynamic programme makes it exact.
    """

    def __init__(self, structure: Structure, costs: Mapping[str, Cost]) -> None:
        self._projector = Projector(structure, costs)
        self._grids = padded_grids(structure)
        self._rows = np.arange(len(structure))
        self._lines: dict[str, CostLines] = {}
        self._classes: dict[tuple[str, ...], list[IntArray]] = {}

    def solve(self, penalties: Sequence[FloatArray], limits: Limits) -> IntArray:
        """Grid positions [groups] of nearly the least summed penalties; no group can take one more cell.

        Args:
            penalties: for each group one value a grid position; see the function of this name.
            limits: upper bounds by cost, as ratios to dense.

        Raises:
            InputError: a limit lies below what the grids can reach.
        """
        self._projector.check(limits)
        padded, names = self._padded(penalties), tuple(limits)
        positions, price = self._relaxed(padded, limits)
        for _ in range(REPAIRS):
            better = self._exchanged(padded, positions, dict(zip(names, price, strict=True)), limits)
            if better is None:
                break
            positions = better
        if len(names) == 1 and self._line(names[0]).additive:
            positions = self._exact(padded, positions, names[0], float(price[0]), limits)
        return self._projector.give_back(positions, limits)

    def front(self, penalties: Sequence[FloatArray], cost: str, limits: Limits) -> list[IntArray]:
        """One sweep over the price of `cost`: grid positions from narrow to dense, within `limits`, none dominated.

        Raises:
            InputError: a limit on another cost lies below what the grids can reach.
        """
        others = {name: limit for name, limit in limits.items() if name != cost}
        padded, names = self._padded(penalties), (cost, *others)
        swept = self._swept(padded, names, np.zeros(len(names)))
        if others:
            self._projector.check(others)
            swept += self._swept(padded, names, np.append(0.0, self._relaxed(padded, others)[1]))
        candidates = np.unique(np.stack(swept), axis=0)
        if limits:
            candidates = candidates[self._projector.fits(candidates, limits)]
        return self._undominated(candidates, penalties, cost)

    def _swept(self, padded: FloatArray, names: tuple[str, ...], extra: FloatArray) -> list[IntArray]:
        """Positions at many prices of the first cost, beside the prices `extra` of all."""

        def at(price: float, start: IntArray) -> tuple[float, float, IntArray]:
            found = self._settled(padded, names, np.append(price, extra[1:]), start)
            return price, float(self._costs(found[None], names[0])[0]), found

        points = [at(0.0, self._projector.codec.last)]
        price = max(float(padded[self._rows, 0].sum()), TRUST)
        points.append(at(price, points[-1][2]))
        while points[-1][2].any() and len(points) < SWEEP // 2:
            points.append(at(points[-1][0] * 8, points[-1][2]))
        while len(points) < SWEEP:
            gaps = [
                wide[1] - narrow[1] if narrow[0] > wide[0] * (1 + PRECISION) + TRUST * price else 0.0
                for wide, narrow in itertools.pairwise(points)
            ]
            i = int(np.argmax(gaps))
            if gaps[i] <= 0:
                break
            low, high = points[i][0], points[i + 1][0]
            points.insert(i + 1, at(float(np.sqrt(low * high)) if low else high / 16, points[i][2]))
        return [positions for _, _, positions in points]

    def _undominated(self, candidates: IntArray, penalties: Sequence[FloatArray], cost: str) -> list[IntArray]:
        costs, losses = self._costs(candidates, cost), predicted_loss(penalties, candidates)
        order = np.lexsort((losses, costs))
        least = np.minimum.accumulate(np.concatenate([[np.inf], losses[order]]))
        return [candidates[i] for n, i in enumerate(order) if losses[i] < least[n]]

    def _relaxed(self, padded: FloatArray, limits: Limits) -> tuple[IntArray, FloatArray]:
        """Positions within the limits and the price of each limit at which they were found."""
        names, bounds = tuple(limits), np.array(list(limits.values()))
        alone = [self._bisected(padded, limits, weight) for weight in np.eye(len(names))]
        for positions, price in alone:
            if positions is not None and self._projector.fits(positions[None], limits)[0]:
                return positions, price
        best: tuple[float, IntArray, FloatArray] | None = None
        weights = np.array([price.sum() for _, price in alone]) + TRUST
        for _ in range(MIXES):
            positions, price = self._bisected(padded, limits, weights / weights.sum(), every=True)
            if positions is not None:
                loss = float(padded[self._rows, positions].sum())
                if best is None or loss < best[0]:
                    best = loss, positions, price
                tight = np.array([self._costs(positions[None], n)[0] for n in names]) / bounds
                weights = weights * (tight / tight.max()) ** 8  # a limit with room to spare need not be paid for
        if best is None:  # costs that are not monotone may be too rough to be priced
            return self._projector.positions(np.ones(len(self._rows)), limits), np.zeros(len(names))
        return best[1], best[2]

    def _bisected(
        self, padded: FloatArray, limits: Limits, weights: FloatArray, every: bool = False
    ) -> tuple[IntArray | None, FloatArray]:
        """The least multiple of the prices `weights` at which the priced limits (or `every` one) hold."""
        names = tuple(limits)
        checked = {n: limits[n] for n, w in zip(names, weights, strict=True) if w > 0 or every}

        def holds(positions: IntArray) -> bool:
            return bool(self._projector.fits(positions[None], checked)[0])

        wide = self._settled(padded, names, weights * 0.0, self._projector.codec.last)
        if holds(wide):
            return wide, weights * 0.0
        scale = max(float(padded[self._rows, 0].sum()), TRUST)
        low, high, narrow = 0.0, scale / 64, self._settled(padded, names, weights * scale / 64, wide)
        while not holds(narrow):
            low, wide, high = high, narrow, high * 8
            if high > scale * 1e12:
                return None, weights * high
            narrow = self._settled(padded, names, weights * high, narrow)
        for _ in range(STEPS):
            if np.array_equal(wide, narrow):
                break
            middle = np.sqrt(low * high) if low else high / 16
            positions = self._settled(padded, names, weights * middle, wide)
            if holds(positions):
                high, narrow = middle, positions
            else:
                low, wide = middle, positions
        return narrow, weights * high

    def _settled(self, padded: FloatArray, names: tuple[str, ...], price: FloatArray, start: IntArray) -> IntArray:
        """Coordinate descent on penalties + price * costs; groups without a common product move together."""
        positions = start.copy()
        priced = [(self._line(n), p) for n, p in zip(names, price, strict=True) if p > 0]
        for _ in range(ROUNDS):
            before = positions.copy()
            for groups in self._moving_together(names):
                total = padded[groups]
                for line, p in priced:
                    total = total + p * line.change(positions, groups)
                # the widest of equals
                positions[groups] = total.shape[1] - 1 - np.argmin(total[:, ::-1], axis=1)
            if np.array_equal(before, positions):
                break
        return positions

    def _exchanged(
        self, padded: FloatArray, positions: IntArray, price: Mapping[str, float], limits: Limits
    ) -> IntArray | None:
        """The best of all pairs (and singles) of the most promising moves of one group each, None if none helps."""
        loss = padded - padded[self._rows, positions][:, None]
        change = {n: self._line(n).change(positions, self._rows) for n in limits}
        reduced = np.sum([price[n] * change[n] for n in limits], axis=0) + loss
        reduced[self._rows, positions] = np.inf
        tried = MOVES if all(self._line(n).quadratic for n in limits) else MOVES_EVALUATED
        moves = np.argsort(reduced, axis=None, kind="stable")[: min(tried, int(np.isfinite(reduced).sum()))]
        if not len(moves):
            return None
        group, cell = np.divmod(moves, padded.shape[1])
        single = loss[group, cell]
        gained = single[:, None] + single
        gained[group[:, None] == group] = np.inf
        np.fill_diagonal(gained, single)
        for name, limit in limits.items():
            gained[self._line(name).pairs(positions, group, cell) > limit + TRUST] = np.inf
        for best in np.argsort(gained, axis=None)[:8]:
            if gained.flat[best] >= -1e-12 * max(1e-9, float(padded[self._rows, positions].sum())):
                return None
            moved, pair = positions.copy(), list(divmod(int(best), len(group)))
            moved[group[pair]] = cell[pair]
            if self._projector.fits(moved[None], limits)[0]:
                return moved
        return None

    def _exact(self, padded: FloatArray, positions: IntArray, name: str, price: float, limits: Limits) -> IntArray:
        """The best positions there are where the cost adds up over the groups; `positions` where nothing beats them."""
        narrowest = np.zeros_like(positions)
        table = self._line(name).change(narrowest, self._rows)
        room = limits[name] + SLACK - float(self._costs(narrowest[None], name)[0])
        found = _dynamic_programme(padded, table, room, price, float(padded[self._rows, positions].sum()))
        if found is None or not self._projector.fits(found[None], limits)[0]:
            return positions
        return found

    def _padded(self, penalties: Sequence[FloatArray]) -> FloatArray:
        """Penalties as one array [groups, positions], inf beyond a group's grid."""
        sizes = self._projector.codec.last + 1
        if [len(p) for p in penalties] != sizes.tolist():
            raise InputError("penalties must hold one value for each position on each group's grid")
        padded: FloatArray = np.full(self._grids.shape, np.inf)
        padded[np.arange(padded.shape[1]) < sizes[:, None]] = np.concatenate(penalties)
        return padded

    def _costs(self, positions: IntArray, name: str) -> FloatArray:
        return self._projector.costs[name](self._projector.codec.widths(positions))

    def _line(self, name: str) -> CostLines:
        if name not in self._lines:
            self._lines[name] = CostLines(self._projector.codec, self._grids, self._projector.costs[name])
        return self._lines[name]

    def _moving_together(self, names: tuple[str, ...]) -> list[IntArray]:
        """The groups in few classes such that no cost couples two groups of one class (greedy colouring)."""
        if names not in self._classes:
            coupled = np.any([self._line(n).coupled for n in names], axis=0)
            colours: list[list[int]] = []
            for group in self._rows.tolist():
                free = (c for c in colours if not coupled[group, c].any())
                colour = next(free, None)
                if colour is None:
                    colours.append([group])
                else:
                    colour.append(group)
            self._classes[names] = [np.array(c, dtype=np.int64) for c in colours]
        return self._classes[names]


def _dynamic_programme(
    losses: FloatArray, costs: FloatArray, room: float, price: float, incumbent: float
) -> IntArray | None:
    """One cell a group [groups], of the least sum of `losses` with `costs` in `room`; None if not below `incumbent`.

    Both arrays are [groups, cells]. A state, a choice for the groups so far, is kept where none that costs as little
    loses less (Nemhauser and Ullmann 1969) and where its Lagrangian bound at `price` is below the incumbent.
    """
    reduced = losses + price * costs
    rest = np.append(np.cumsum(reduced.min(axis=1)[::-1])[::-1], 0.0) - price * room
    spent, lost = np.zeros(1), np.zeros(1)
    back: list[tuple[IntArray, IntArray]] = []
    for group in range(len(losses)):
        cells = np.flatnonzero(reduced[group] - reduced[group].min() + rest[0] < incumbent)
        cost = (spent[:, None] + costs[group, cells]).ravel()
        loss = (lost[:, None] + losses[group, cells]).ravel()
        bound = loss + price * cost + rest[group + 1]
        alive = np.flatnonzero((cost <= room) & (bound < incumbent) & (loss < incumbent))
        alive = alive[np.argsort(bound[alive], kind="stable")[:STATES]]
        alive = alive[np.lexsort((loss[alive], cost[alive]))]
        alive = alive[loss[alive] < np.minimum.accumulate(np.append(np.inf, loss[alive]))[:-1]]
        if not len(alive):
            return None
        back.append((alive // len(cells), cells[alive % len(cells)]))
        spent, lost = cost[alive], loss[alive]
    state, found = int(np.argmin(lost)), np.zeros(len(losses), dtype=np.int64)
    for group, (parents, chosen) in reversed(list(enumerate(back))):
        found[group], state = chosen[state], int(parents[state])
    return found


def _curve(grid: FloatArray, measured: Mapping[int, float], dense: float, worst: float) -> FloatArray:
    """One group's penalties on its grid, from measured {width: loss}."""
    last = int(grid[-1])
    widths = np.array([*sorted(w for w in measured if w < last), last], dtype=np.float64)
    rise = np.array([measured.get(int(w), dense) for w in widths]) - dense
    rise[-1] = 0.0
    rise = np.maximum.accumulate(np.maximum(np.where(np.isfinite(rise), rise, worst), 0.0)[::-1])[::-1]
    root = np.sqrt(rise)
    values = np.interp(grid, widths, root)
    if len(widths) > 1:
        slope = (root[0] - root[1]) / (widths[1] - widths[0])
        below = grid < widths[0]
        values[below] = root[0] + slope * (widths[0] - grid[below])
    return np.asarray(values**2, dtype=np.float64)


def _dense_loss(problem: Problem, table: Mapping[str, Mapping[int, float]]) -> float:
    """What the unpruned model loses: as measured, else 0 for a loss that is never negative, else the least known."""
    dense = {g.name: g.width for g in problem.structure.groups}
    known = [table[name][width] for name, width in dense.items() if width in table[name]]
    seeded = [s.loss for s in problem.seeds if s.ok and s.ask.policy.as_dict() == dense]
    if known or seeded:
        return float(min(known or seeded))
    losses = [v for row in table.values() for v in row.values() if np.isfinite(v)]
    return float(min([0.0, *losses]))
