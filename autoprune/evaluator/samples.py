"""The evaluator's samples in batches that shrink where memory runs out, and what the dense model computes for them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from autoprune.database.batches import Parts, chunks, cut, gather, prepare, size
from autoprune.evaluation import Split
from autoprune.evaluator.dense_reference import Reference, observe
from autoprune.evaluator.memory import with_room
from autoprune.evaluator.precision import Precision
from autoprune.protocols import Batch, Task
from autoprune.tracing.wiring import Site

SMALLEST_BATCH = 8


class Samples:
    """Batches of every split, always the same ones in the same order, and the dense model's answers, seen once.

    The dense model runs in `precision`, so that like is compared with like; on validation always in float32. Batches
    that repair themselves by their `own` statistics are cut apart: smaller ones give other losses, and that is said.
    """

    def __init__(
        self, task: Task, dense: nn.Module, parts: Parts, device: torch.device, batch_size: int, validation: int
    ) -> None:
        self.parts, self.batch_size, self.own_size = parts, batch_size, batch_size
        self.precision: Precision = "fp32"
        self.statistics = parts.statistics
        self.seen: Reference
        self._task, self._dense, self._device, self._validation = task, dense, device, validation
        self._batches: dict[Split, Sequence[Batch]] = {"fitness": parts.fitness, "heldback": parts.heldback}
        self._own: Sequence[Batch] = parts.fitness
        self._references: dict[tuple[Split, int, int, int], Reference] = {}
        self._sites: Mapping[str, Site] = {}

    def look(self, sites: Mapping[str, Site]) -> None:
        """Run the dense model on the statistics batch, which is halved where it does not fit; `seen` is what it saw."""
        self._sites = sites
        self.seen = with_room(
            lambda: observe(self._dense, self._task, self.statistics, sites, self.precision), self._halve_statistics
        )

    def batches(self, split: Split) -> Sequence[Batch]:
        """The batches of a split; validation is loaded when it is first asked for."""
        if split not in self._batches:
            whole = gather(self._task.split("validation"), self._validation)
            parts = (part for batch in whole for part in chunks(batch, self.batch_size))
            self._batches[split] = tuple(prepare(b, self._device, self.parts.layout) for b in parts)
        return self._batches[split]

    def share(self, split: Split, fraction: float, own: bool = False) -> Sequence[Batch]:
        """Always the same first samples of a split: as many as make up the fraction."""
        batches = self._own if own else self.batches(split)
        if fraction == 1.0:
            return batches
        left, taken = max(1, round(fraction * sum(size(b) for b in batches))), []
        for batch in batches:
            taken.append(batch if size(batch) <= left else cut(batch, 0, left))
            left -= size(taken[-1])
            if left <= 0:
                break
        return taken

    def reference(self, split: Split, index: int, batch: Batch, own: bool = False) -> Reference:
        """The dense model on a batch of a split, or on its first samples."""
        key = (split, self.own_size if own else self.batch_size, index, size(batch))
        if key not in self._references:
            self._references[key] = observe(self._dense, self._task, batch, None, self.precision_on(split))
        return self._references[key]

    def precision_on(self, split: Split) -> Precision:
        """Validation decides what is exported and compared, so it is never rounded."""
        return "fp32" if split == "validation" else self.precision

    def halve(self) -> bool:
        """Halve the batch size; False where that would make batches of fewer than 8."""
        if self.batch_size // 2 < SMALLEST_BATCH:
            return False
        self.batch_size //= 2
        self._batches = {
            split: tuple(part for batch in batches for part in chunks(batch, self.batch_size))
            for split, batches in self._batches.items()
        }
        self._references.clear()
        return True

    def halve_own(self) -> bool:
        """Halve the fitness batches that repair themselves, and say so; False below 8."""
        half = self.own_size // 2
        if half < SMALLEST_BATCH:
            return False
        warnings.warn(
            f"{self.own_size} samples do not fit in memory at once: batches of {half} repair themselves, and losses "
            "of the tier stitch differ from those with more memory; evaluator.fitness: refit does not depend on it",
            stacklevel=2,
        )
        self.own_size = half
        self._own = tuple(part for batch in self._own for part in chunks(batch, half))
        self._references.clear()
        return True

    def halve_statistics(self) -> bool:
        """Halve the statistics batch, which a repair needs whole, and look anew; False below 8."""
        if not self._halve_statistics():
            return False
        self.look(self._sites)
        return True

    def _halve_statistics(self) -> bool:
        before = size(self.statistics)
        if before // 2 < SMALLEST_BATCH:
            return False
        self.statistics = cut(self.statistics, 0, before // 2)
        warnings.warn(
            f"the {before} statistics samples do not fit in memory at once: the first {before // 2} are used, and "
            "results differ from those with more memory",
            stacklevel=2,
        )
        return True
