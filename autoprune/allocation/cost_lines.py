"""A cost along one group's grid with all other groups held: closed form where it is quadratic in the widths."""

from __future__ import annotations

import numpy as np

from autoprune.codec import Codec
from autoprune.policy import IntArray
from autoprune.protocols import Cost, FloatArray
from autoprune.structure import Structure

CHUNK = 4096  # rows of widths in one call of the cost
EXACT = 1e-10  # a prediction this near (in ratios to dense) is the cost itself
PROBES = 16  # random widths at which a prediction is checked


def padded_grids(structure: Structure) -> FloatArray:
    """The grids as one array [groups, positions]; beyond a group's grid its dense width again."""
    longest = max((len(g.grid) for g in structure.groups), default=1)
    rows = [[*g.grid, *[g.width] * (longest - len(g.grid))] for g in structure.groups]
    return np.array(rows, dtype=np.float64).reshape(len(structure), longest)


class CostLines:
    """What one cost becomes when one group takes another width.

    Costs of networks are sums of products of at most two widths, so that a few differences tell all about them; that
    is checked (`quadratic`), and any other cost is evaluated. `coupled` [groups, groups] says which groups it
    multiplies; it is `additive` where it is a sum over single groups.
    """

    def __init__(self, codec: Codec, grids: FloatArray, cost: Cost) -> None:
        self._codec, self._cost, self._grids = codec, cost, grids
        self._above, self._rows = grids - grids[:, :1], np.arange(len(grids))
        self._low = np.zeros_like(codec.last)
        mixed = self._mixed()
        self.coupled = np.abs(mixed) > 1e-13
        span = np.maximum(grids[:, -1] - grids[:, 0], 1.0)
        self._coupling = np.where(self.coupled, mixed, 0.0) / (span[:, None] * span)
        self._slope, self._square = self._along()
        probes = np.random.default_rng(0).integers(0, codec.last + 1, size=(PROBES, len(codec.last)))
        base, found = self._at(self._low[None])[0], self._at(probes)
        self.quadratic = bool(np.allclose(base + self._predicted(probes), found, rtol=0, atol=EXACT))
        apart = self.change(self._low, np.arange(len(self._low)))[np.arange(len(self._low)), probes].sum(axis=1)
        self.additive = bool(np.allclose(base + apart, found, rtol=0, atol=EXACT))

    def change(self, positions: IntArray, groups: IntArray) -> FloatArray:
        """Cost at every grid position of each of `groups` less the cost at `positions`: [len(groups), positions]."""
        if not self.quadratic:
            return self._evaluated(positions, groups)
        here = self._above[self._rows, positions]
        slope = self._slope[groups] + self._coupling[groups] @ here
        there, now = self._above[groups], here[groups][:, None]
        return np.asarray((there - now) * (slope[:, None] + self._square[groups][:, None] * (there + now)))

    def pairs(self, positions: IntArray, groups: IntArray, cells: IntArray) -> FloatArray:
        """Cost after each two of the moves of `groups` to `cells`: [moves, moves], of one alone on the diagonal.

        Two moves of one group mean nothing.
        """
        here, n = float(self._at(positions[None])[0]), len(groups)
        if not self.quadratic:
            first, second = np.triu_indices(n)
            rows = np.repeat(positions[None], len(first), axis=0)
            rows[np.arange(len(rows)), groups[first]] = cells[first]
            rows[np.arange(len(rows)), groups[second]] = cells[second]
            costs = np.empty((n, n))
            costs[first, second] = costs[second, first] = self._at(rows)
            return costs
        single = self.change(positions, groups)[np.arange(n), cells]
        step = self._grids[groups, cells] - self._grids[groups, positions[groups]]
        both = single[:, None] + single + self._coupling[groups[:, None], groups] * step[:, None] * step
        np.fill_diagonal(both, single)
        return np.asarray(here + both)

    def _evaluated(self, positions: IntArray, groups: IntArray) -> FloatArray:
        longest = self._grids.shape[1]
        rows = np.repeat(positions[None], len(groups) * longest, axis=0)
        cells = np.minimum(np.arange(longest), self._codec.last[groups][:, None])
        rows[np.arange(len(rows)), np.repeat(groups, longest)] = cells.ravel()
        changes = self._at(rows) - self._at(positions[None])[0]
        return np.asarray(changes.reshape(len(groups), longest))

    def _predicted(self, positions: IntArray) -> FloatArray:
        """Cost above that of the narrowest widths, by the quadratic form."""
        above = self._above[self._rows, positions]
        products = 0.5 * np.einsum("kg,gh,kh->k", above, self._coupling, above)
        return np.asarray(above @ self._slope + above**2 @ self._square + products)

    def _along(self) -> tuple[FloatArray, FloatArray]:
        """Each group's own line from the narrowest widths: slope and square, through two of its widths."""
        last = self._codec.last
        middle = last // 2
        base = self._at(self._low[None])[0]
        full, half = (self._at(np.diag(p)) - base for p in (last, middle))
        span = self._grids[np.arange(len(last)), last] - self._grids[:, 0]
        part = self._grids[np.arange(len(last)), middle] - self._grids[:, 0]
        whole = np.divide(full, span, out=np.zeros_like(span), where=span > 0)
        start = np.divide(half, part, out=whole.copy(), where=part > 0)
        square = np.divide(whole - start, span - part, out=np.zeros_like(span), where=span > part)
        return whole - square * span, np.where(part > 0, square, 0.0)

    def _mixed(self) -> FloatArray:
        """Dense pair less each dense alone plus none, all others narrowest: [groups, groups], 0 on the diagonal."""
        n = len(self._low)
        base = self._at(self._low[None])[0]
        alone = self._at(np.diag(self._codec.last)) - base
        first, second = np.triu_indices(n, 1)
        both = np.empty(len(first))
        for start in range(0, len(first), CHUNK):
            part = slice(start, start + CHUNK)
            rows = np.zeros((len(first[part]), n), dtype=np.int64)
            rows[np.arange(len(rows)), first[part]] = self._codec.last[first[part]]
            rows[np.arange(len(rows)), second[part]] = self._codec.last[second[part]]
            both[part] = self._at(rows)
        mixed = np.zeros((n, n))
        mixed[first, second] = both - base - alone[first] - alone[second]
        return mixed + mixed.T

    def _at(self, positions: IntArray) -> FloatArray:
        return self._cost(self._codec.widths(positions))
