"""One call of `apply` for whoever looks on: which stage it is in, how far that is, about how long it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoprune.application.delivery import delivering
from autoprune.application.order import Order
from autoprune.files.job import Job
from autoprune.protocols import Step, relayed
from autoprune.run.pace import Pace
from autoprune.tracing.one_thread import one_thread


class UnderWay:
    """Iterate it to its end; then `report` is what `apply_file` returns. The arguments are those of `apply_file`.

    `done` of `total` measures a stage that is counted, `counted` says it in words, `left_s` is about the time that it
    takes still.
    """

    of = "stage"

    def __init__(
        self, policy_path: Path, model: Job | str, at: str | Sequence[str], out: Path, order: Order | None = None
    ) -> None:
        self.stage, self.note = "start", ""
        self._steps, self._pace, self._step = delivering(policy_path, model, at, out, order), Pace(), Step("start")
        self._report: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Step]:
        """The steps, each when what it names begins or is done.

        Raises:
            InputError: see `delivering`.
            RunError: see `delivering`.
        """
        with one_thread():
            self._report = yield from relayed(self._steps, self._noted)

    def _noted(self, step: Step) -> Step:
        """A step that is under way now."""
        self._pace.take(replace(step, ahead_s=0.0) if step.unit and step.ahead_s is None else step)
        self._step, self.stage = step, step.stage
        return step

    @property
    def report(self) -> dict[str, Any]:
        """apply.json, or those of several points."""
        assert self._report is not None, "iterate it first"
        return self._report

    @property
    def counted(self) -> str:
        """How far the stage is, in words."""
        return self._pace.counted

    @property
    def left_s(self) -> float | None:
        """What the stage takes still, as far as that is known."""
        return self._pace.left_s

    @property
    def total(self) -> float:
        """What the stage counts to; 0 where it counts nothing."""
        return self._step.total if self._step.unit else 0.0

    @property
    def done(self) -> float:
        return self._step.done
