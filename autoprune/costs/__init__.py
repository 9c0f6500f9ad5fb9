"""Costs, one file each: ratios to the dense model in closed form, or from a table that was measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from autoprune import plugins
from autoprune.errors import InputError, one_line
from autoprune.policy import Policy

if TYPE_CHECKING:
    from autoprune.costs._latency_table import LatencyTable
    from autoprune.protocols import Cost
    from autoprune.structure import Structure


def build_cost(name: str, structure: Structure, table: LatencyTable | None = None) -> Cost:
    """The cost called `name`, or a user's "module:Class"; `latency` is built from its `table`.

    Raises:
        InputError: no such cost, it does not suit the structure or breaks the protocol, or latency without a table.
    """
    made = plugins.load("costs", name)
    if name != "latency":
        return _checked(name, made, structure)
    if table is None:
        raise InputError("cost 'latency' needs a measured latency table, and there is none")
    latency: Cost = made(structure, table)
    return latency


def _checked(name: str, made: Any, structure: Structure) -> Cost:
    """`made` of the structure; what a search would stumble over after minutes is said at once."""
    dense = Policy.dense(structure).array(structure)
    try:
        cost: Cost = made(structure)
        one, two = np.asarray(cost(dense)), np.asarray(cost(np.stack([dense, dense])))
        unit, monotone = float(cost.dense), cost.monotone
    except InputError:
        raise
    except Exception as error:  # a user's cost may fail in any way
        reason = one_line(error)
        raise InputError(
            f"cost {name!r} fails: {reason}; it must be a class C(structure) as in docs/extending.md"
        ) from error
    if one.shape != () or two.shape != (2,):
        raise InputError(
            f"cost {name!r} must map widths [..., groups] to ratios [...]; for [2, groups] it gave {two.shape}"
        )
    if not np.allclose([one, *two], 1.0, rtol=0, atol=1e-9):
        raise InputError(
            f"cost {name!r} must be 1 at the dense widths, as a ratio to the dense model, not {float(one):g}"
        )
    if not (math.isfinite(unit) and unit > 0 and isinstance(monotone, bool)):
        raise InputError(
            f"cost {name!r}: dense must be a number above 0 and monotone a bool, not {unit} and {monotone!r}"
        )
    return cost
