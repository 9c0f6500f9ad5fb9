"""Connection sensitivity (Lee et al. 2019, SNIP: Single-shot Network Pruning based on Connection Sensitivity)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from autoprune.criteria._atoms import summed_by_atom
from autoprune.criteria._gradients import means, working_copy
from autoprune.protocols import Task
from autoprune.structure import Group


class Snip:
    """|w * dL/dw| with the gradient of the mean loss over all calibration samples; of an atom the sum of what it owns.

    The derivative for the gate of a connection. The paper takes it at initialisation and divides it by its sum over all
    connections, which changes no order; here it is taken at the weights as they are.
    """

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        return summed_by_atom(model, groups, lambda names: self.weights(model, names, task))

    def weights(self, model: nn.Module, names: Sequence[str], task: Task) -> Mapping[str, Tensor]:
        gates = means("snip", working_copy(model), names, task, lambda w, slope: w * slope)
        return {name: gate.abs() for name, gate in gates.items()}
