"""Costs, one file each: ratios to the dense model in closed form, or from a table that was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoprune import plugins
from autoprune.errors import InputError

if TYPE_CHECKING:
    from autoprune.costs._latency_table import LatencyTable
    from autoprune.protocols import Cost
    from autoprune.structure import Structure


def build_cost(name: str, structure: Structure, table: LatencyTable | None = None) -> Cost:
    """The cost called `name`, or a user's "module:Class"; `latency` is built from its `table`.

    Raises:
        InputError: no such cost, it does not suit the structure, or latency without a table.
    """
    made = plugins.load("costs", name)
    if name != "latency":
        cost: Cost = made(structure)
        return cost
    if table is None:
        raise InputError("cost 'latency' needs a measured latency table, and there is none")
    latency: Cost = made(structure, table)
    return latency
