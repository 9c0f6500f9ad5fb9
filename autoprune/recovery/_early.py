"""An early checkpoint of the dense model, which trainings go back to (Frankle et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from autoprune.errors import InputError
from autoprune.recovery._distilled import PLACE, WHERE
from autoprune.tasks._weights import fill, read_checkpoint
from autoprune.tracing.copies import copied


@dataclass(frozen=True)
class Early:
    """The checkpoint in the file `weights`, which the recovery called `name` goes back to.

    Raises:
        InputError: there is no such file.
    """

    name: str
    weights: Path | None

    def __post_init__(self) -> None:
        if self.weights is None:
            raise InputError(f"{WHERE}: {self.name} needs weights, an early checkpoint of the dense model; {PLACE}")
        if not Path(self.weights).is_file():
            raise InputError(f"{WHERE}: {self.name}: no weights file {self.weights}")

    def check(self, dense: nn.Module) -> None:
        """Read the checkpoint once, before any work.

        Raises:
            InputError: the file is damaged, or of another model than `dense`.
        """
        self.start(copied(dense))

    def start(self, model: nn.Module) -> None:
        """Give a copy of the dense model the weights of the checkpoint, in place.

        Raises:
            InputError: the file is missing or of another model.
        """
        assert self.weights is not None
        fill(model, read_checkpoint(Path(self.weights)), Path(self.weights))
