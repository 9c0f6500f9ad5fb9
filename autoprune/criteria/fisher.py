"""Diagonal Fisher information: optimal brain damage (LeCun et al. 1990; Theis et al. 2018, Faster Gaze Prediction)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from autoprune.criteria._atoms import summed_by_atom
from autoprune.criteria._gradients import calibration, means, working_copy
from autoprune.database.rows import chunks
from autoprune.protocols import Batch, Task
from autoprune.structure import Group

NAME = "fisher"


class Fisher:
    """w^2 * mean of squared gradients over pieces of `batch_size` samples; of an atom the sum of what it owns.

    With the default of 1 the gradients are those of single samples, so that their mean square is the diagonal of the
    empirical Fisher information, which stands for that of the Hessian; the half in OBD's w^2 h / 2 changes no order.
    Larger pieces take fewer backward passes, and see less of what differs between samples. Batches that cannot be cut
    into samples go through whole.
    """

    def __init__(self, batch_size: int = 1) -> None:
        if int(batch_size) != batch_size or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number from 1 on, not {batch_size!r}")
        self._batch_size = int(batch_size)

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        return summed_by_atom(model, groups, lambda names: self.weights(model, names, task))

    def weights(self, model: nn.Module, names: Sequence[str], task: Task) -> Mapping[str, Tensor]:
        pieces = self._pieces(task)
        return means(NAME, working_copy(model), names, task, lambda w, slope: (w * slope).square(), pieces)

    def _pieces(self, task: Task) -> Iterator[Batch]:
        for batch in calibration(NAME, task):
            yield from chunks(batch, self._batch_size)
