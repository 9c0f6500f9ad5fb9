"""A latency table by formula: a time a call, a time a product; widths off the vector length cost half as much again."""

from __future__ import annotations

import numpy as np

from autoprune.costs._latency_features import attainable
from autoprune.costs._latency_table import LatencyTable, OpTimes
from autoprune.structure import Op, Structure, TensorSpec

COEFFICIENTS = {"ops": 0.8, "elements": 0.1, "macs": 0.0}


def latency_table(structure: Structure, step: int = 8, fixed_ms: float = 0.001) -> LatencyTable:
    """A table over every width of `structure`; `step` is the vector length."""
    ops = []
    for op in structure.ops:
        if op.weight is not None:
            spec = next(t for t in op.tensors if t.name == op.weight)
            ops.append(_times(structure, op, spec, step, fixed_ms))
    return LatencyTable(structure.fingerprint, "formula", 1, "none", 2.5, 24, COEFFICIENTS, 0.01, 0.99, 0.9, tuple(ops))


def _times(structure: Structure, op: Op, spec: TensorSpec, step: int, fixed_ms: float) -> OpTimes:
    rows, columns = attainable(structure, spec, 0), attainable(structure, spec, 1)
    odd = np.where(np.asarray(rows) % step, 1.5, 1.0)[:, None]
    ms = fixed_ms + 1e-6 * op.positions * np.outer(rows, columns) * odd
    return OpTimes(((spec.name, 1),), rows, columns, tuple(tuple(line) for line in ms.tolist()))
