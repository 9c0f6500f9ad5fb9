"""ERK: the smaller a layer's weight, the denser it stays, by the sum of its dimensions over their product."""

from __future__ import annotations

from math import prod

import numpy as np

from autoprune.allocation.budget import Projector
from autoprune.policy import IntArray, Policy
from autoprune.protocols import FloatArray, Problem
from autoprune.strategies._declared import declares
from autoprune.structure import Structure


@declares(kinds=("channel", "head", "kv_group", "neuron", "weight"))  # a block has no shape
def erk(problem: Problem, target: float) -> Policy:
    """Erdos-Renyi kernel (Evci et al. 2020): densities min(1, c * erk), c as large as the budget and limits allow."""
    structure = problem.structure
    limits = {**problem.budget.limits, problem.budget.cost: target}
    projector = Projector(structure, problem.costs, problem.scores)
    densities = erk_densities(structure)
    # widths change only where c * density meets a grid width
    cells = [np.array(g.grid) / g.width / d for g, d in zip(structure.groups, densities, strict=True)]
    scales = np.unique(np.concatenate([np.zeros(1), *cells]))

    def positions_at(index: IntArray) -> IntArray:
        return projector.codec.floor(scales[index][..., None] * densities)

    start = projector.widest(len(scales), positions_at, limits)
    return projector.codec.policy(projector.give_back(start, limits))


def erk_densities(structure: Structure) -> FloatArray:
    """For each group, (n_in + n_out + k_h + k_w) / (n_in * n_out * k_h * k_w), averaged over the weights it scales.

    That of a group of weights is its own matrix, as in the paper.
    """
    shapes = {spec.name: spec.shape for op in structure.ops for spec in op.tensors}
    weights = {op.weight for op in structure.ops if op.weight is not None}
    densities = []
    for group in structure.groups:
        scaled = [
            shapes[t] for t in dict.fromkeys((*(s.tensor for s in group.slices), *group.matrices)) if t in weights
        ]
        densities.append(np.mean([sum(shape) / prod(shape) for shape in scaled]) if scaled else 1.0)
    return np.array(densities, dtype=np.float64)
