"""Costs, one file each: ratios to the dense model in closed form, or from a table that was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autoprune import plugins
from autoprune.codec import Codec
from autoprune.errors import InputError
from autoprune.policy import IntArray
from autoprune.protocols import FloatArray

if TYPE_CHECKING:
    from autoprune.costs._latency_table import LatencyTable
    from autoprune.protocols import Cost
    from autoprune.structure import Structure

TRIED = 64
"""Widths at which a cost is tried before it is used."""
SLACK = 1e-9


def build_cost(name: str, structure: Structure, table: LatencyTable | None = None) -> Cost:
    """The cost called `name`, or a user's "module:Class"; `latency` is built from its `table`.

    What a user's own cost gives later is looked at too: a PluginError where it is no number.

    Raises:
        InputError: no such cost, it does not suit the structure or breaks the protocol, or latency without a table.
    """
    made = plugins.load("costs", name)
    if name != "latency":
        with plugins.before_work():
            return _checked(name, made, structure)
    if table is None:
        raise InputError("cost 'latency' needs a measured latency table, and there is none")
    latency: Cost = made(structure, table)
    return latency


def _checked(name: str, made: Any, structure: Structure) -> Cost:
    """`made` of the structure, tried; what a search would stumble over after minutes is said at once."""
    with plugins.calling("costs", name, spared=(InputError,)):
        cost: Cost = made(structure)
        unit, monotone = float(cost.dense), cost.monotone
    if not (math.isfinite(unit) and unit > 0 and isinstance(monotone, bool)):
        said = f"is unfit: dense must be a number above 0 and monotone a bool, not {unit} and {monotone!r}"
        raise plugins.broken("costs", name, said)
    watched = Watched(name, cost, unit, monotone)
    _try_out(watched, Codec(structure))
    return watched if ":" in name else cost


@dataclass
class Watched:
    """The cost called `name`, whose mistakes name it: what it raises, other shapes, ratios that are no numbers."""

    name: str
    cost: Cost
    dense: float
    monotone: bool

    def __call__(self, widths: IntArray) -> FloatArray:
        """Widths [..., groups] -> ratio [...]."""
        wanted = np.shape(widths)[:-1]
        with plugins.calling("costs", self.name, f"on widths {list(np.shape(widths))}"):
            ratios = np.asarray(self.cost(widths), dtype=np.float64)
        if ratios.shape != wanted:
            raise plugins.broken(
                "costs", self.name, f"gives ratios {list(ratios.shape)} for widths {list(np.shape(widths))}"
            )
        wrong = ~(np.isfinite(ratios) & (ratios >= 0.0))
        if wrong.any():
            at = np.reshape(widths, (-1, np.shape(widths)[-1]))[wrong.ravel()][0]
            raise plugins.broken("costs", self.name, f"is {ratios[wrong].flat[0]:g} at the widths {at.tolist()}")
        return ratios


def _try_out(cost: Watched, codec: Codec) -> None:
    """At the dense widths, the narrowest ones and some between, each also with one group a step narrower."""
    narrowest = np.zeros_like(codec.last)
    rng = np.random.default_rng(0)
    some = np.stack([codec.last, narrowest, *rng.integers(0, codec.last + 1, size=(TRIED, len(codec.last)))])
    one, ratios = cost(codec.dense), cost(codec.widths(some))
    if not np.allclose([one, ratios[0]], 1.0, rtol=0, atol=SLACK):
        raise plugins.broken("costs", cost.name, f"must be 1 at the dense widths, as a ratio, and is {float(one):g}")
    if cost.monotone and len(codec.last):
        group = rng.integers(0, len(codec.last), size=len(some))
        narrower = some.copy()
        narrower[np.arange(len(some)), group] -= 1
        lower = cost(codec.widths(np.maximum(narrower, 0)))
        if rises := np.flatnonzero(lower > ratios + SLACK).tolist():
            name = codec.structure.names[group[rises[0]]]
            raise plugins.broken(
                "costs", cost.name, f"says that it is monotone, and rises where {name!r} gets narrower"
            )
