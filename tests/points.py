"""Fronts of one point over any model, at random widths, without a search: for tests of what is done with a point."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from autoprune.costs.macs import Macs
from autoprune.costs.params import Params
from autoprune.families import analyze
from autoprune.front import Base, Front, Point
from autoprune.policy import Policy
from autoprune.structure import Structure
from autoprune.tracing.fingerprint import weights_fingerprint
from autoprune.tracing.inputs import described
from autoprune.tracing.slim import named_tensors
from autoprune.tracing.verify import random_keep


def front_over(model: nn.Module, inputs: Any, seed: int = 0, structure: Structure | None = None) -> Front:
    """A point that keeps atoms at random; its losses mean nothing."""
    structure = structure or analyze(model, inputs)
    kept = random_keep(structure.groups, np.random.default_rng(seed))
    policy = Policy.from_array(structure, [len(kept[name]) for name in structure.names])
    dense = {g.name: tuple(range(g.width)) for g in structure if policy.as_dict()[g.name] == g.width}
    keep = {name: tuple(int(a) for a in atoms) for name, atoms in kept.items()} | dense
    macs, params = Macs(structure), Params(structure)
    base = Base(
        structure_fingerprint=structure.fingerprint,
        weights_fingerprint=weights_fingerprint(model),
        model=type(model).__name__,
        inputs=described(inputs),
        costs={"macs": int(macs.dense), "params": int(params.dense)},
        metrics={},
        groups=structure.groups,
        space={"granularity": "auto", "criterion": "obs", "multiple_of": 1},
        data="sha256:" + "1" * 64,
        shapes={name: tuple(t.shape) for name, t in named_tensors(model).items()},
    )
    widths = policy.array(structure)
    ratios = {"macs_ratio": float(macs(widths)), "params_ratio": float(params(widths))}
    counts = {name: round(ratios[f"{name}_ratio"] * base.costs[name]) for name in ("macs", "params")}
    costs = {"macs": counts["macs"], "macs_ratio": ratios["macs_ratio"], "params": counts["params"]}
    losses = {"validation": {"name": "kl", "loss": 0.1}}
    return Front((Point("p00", policy, keep, costs, losses, {}, 0, base),), base, {}, {})
