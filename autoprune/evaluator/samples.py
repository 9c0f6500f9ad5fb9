"""The evaluator's samples in batches that shrink where memory runs out, and what the dense model computes for them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autoprune.database.batches import Parts, bucketed, size
from autoprune.database.drawn import Drawn, draw
from autoprune.evaluation import Split
from autoprune.evaluator.dense_reference import Reference, observe, observe_all
from autoprune.evaluator.fidelity import Fidelity
from autoprune.evaluator.material import BATCH_SIZE
from autoprune.evaluator.memory import FEWEST, with_room
from autoprune.evaluator.precision import Precision
from autoprune.evaluator.shared_reference import TargetFiles
from autoprune.evaluator.top_classes import TopClasses
from autoprune.protocols import Batch, Task
from autoprune.tracing.wiring import Site


@dataclass(frozen=True)
class Seen:
    """Batches that go in lock step, and the dense model on each; moments are those of all of them."""

    batches: Drawn
    references: tuple[Reference, ...]


class Samples:
    """Batches of every split, always the same ones in the same order, and the dense model's answers, seen once.

    The dense model runs in `precision`, so that like is compared with like; on validation always in float32.
    `batch_size` samples are scored together, `at_once` go through a model of those that belong together because a
    repair needs them all. Neither changes a result by more than rounding. With `measure`, outputs over many classes are
    kept as it needs them.
    """

    def __init__(
        self, task: Task, dense: nn.Module, parts: Parts, device: torch.device, batch_size: int, validation: int
    ) -> None:
        self.parts, self.at_once, self.batch_size = parts, parts.fits, min(batch_size, parts.fits)
        self.precision: Precision = "fp32"
        self.measure: Fidelity | None = None
        self.statistics = parts.statistics
        self.seen: Seen
        self._task, self._dense, self._device, self._validation = task, dense, device, validation
        given: dict[Split, Drawn] = {"fitness": parts.fitness, "heldback": parts.heldback}
        if parts.validation is not None:
            given["validation"] = parts.validation
        self._batches = {split: kept.cut_to(self.batch_size) for split, kept in given.items()}
        self._references: dict[tuple[Split, int, int, int], Reference] = {}
        self._own: dict[tuple[int, int], Seen] = {}
        self._sites: Mapping[str, Site] = {}
        self._classes: list[int | None] = []

    @property
    def trained_at_once(self) -> int:
        """Samples of a training step that go through together."""
        return min(BATCH_SIZE, self.batch_size, self.parts.trains)

    def look(self, sites: Mapping[str, Site]) -> None:
        """Run the dense model on the statistics samples; `seen` is what it saw."""
        self._sites = sites
        self.seen = with_room(self._looked, self._shrink)

    def batches(self, split: Split) -> Drawn:
        """The batches of a split; validation is loaded when it is first asked for."""
        if split not in self._batches:
            whole = draw(self._task.split("validation"), self._validation).on(self._device, self.parts.layout)
            self._batches[split] = whole.cut_to(self.batch_size)
        return self._batches[split]

    def share(self, split: Split, fraction: float, own: bool = False) -> Drawn:
        """Always the same first samples of a split: as many as make up the fraction."""
        batches = self.parts.fitness if own else self.batches(split)
        return batches if fraction == 1.0 else batches.first(max(1, round(fraction * batches.samples)))

    def reference(self, split: Split, index: int, batch: Batch) -> Reference:
        """The dense model on a batch of a split, or on its first samples."""
        key = (split, self.batch_size, index, size(batch))
        if key not in self._references:
            found = observe(self._dense, self._task, batch, None, self.precision_on(split))
            self._references[key] = self._thinned(0, found)
        return self._references[key]

    def references(self, split: Split, batches: Drawn) -> list[Reference]:
        """The same for all of them."""
        keys = [(split, self.batch_size, i, n) for i, n in enumerate(batches.sizes)]
        return [self._references.get(key) or self.reference(split, key[2], batches[key[2]]) for key in keys]

    def own(self, index: int, samples: int) -> Seen:
        """The first `samples` of a fitness batch that is to be repaired by its own statistics."""
        if (index, samples) not in self._own:
            self._own[index, samples] = self._observed(self.parts.fitness[index : index + 1].first(samples), None)
        return self._own[index, samples]

    def precision_on(self, split: Split) -> Precision:
        """Validation decides what is exported and compared, so it is never rounded."""
        return "fp32" if split == "validation" else self.precision

    def halve(self) -> bool:
        """Score half as many samples together; False where that would be fewer than 8."""
        if self.batch_size // 2 < FEWEST:
            return False
        self.batch_size //= 2
        self._batches = {split: batches.cut_to(self.batch_size) for split, batches in self._batches.items()}
        self._references.clear()
        return True

    def halve_at_once(self) -> bool:
        """Send half as many samples through at once; False below 8."""
        half = min(self.at_once, max((*self.statistics.sizes, *self.parts.fitness.sizes))) // 2
        if half < FEWEST:
            return False
        self.at_once = half
        self._own.clear()
        return True

    def halve_statistics(self) -> bool:
        """Send half as many statistics samples through at once, in the end only half of them, and look anew."""
        if not self._shrink():
            return False
        self.look(self._sites)
        return True

    def keep_one_kind(self) -> None:
        """Repair by samples of one shape in one batch: the model does not run alike on all of them."""
        largest = max(bucketed(self.statistics.raw), key=size)
        warnings.warn(
            f"the model does not run alike on all statistics samples: {size(largest)} of one shape repair, "
            f"not {self.statistics.samples}, and go through at once",
            stacklevel=2,
        )
        self.statistics, self.at_once = self.statistics.of([largest]), self.parts.total
        self._own.clear()
        self.look(self._sites)

    def _looked(self) -> Seen:
        """What the dense model does on the statistics samples: from the files of this machine, or computed now."""
        folder = self.parts.folder
        if folder is None or self._device.type != "cpu":
            return self._observed(self.statistics, self._sites)
        parts = self.statistics.cut_to(self.at_once)
        files = TargetFiles(folder, self._dense, self._sites, parts.sizes, self.precision)
        found = files.found()
        if found is None:
            found = observe_all(self._dense, self._task, parts, self._sites, self.precision, files.keep)
            files.finish(found)
        return Seen(parts, found)

    def _observed(self, batches: Drawn, sites: Mapping[str, Site] | None) -> Seen:
        parts = batches.cut_to(self.at_once)
        return Seen(parts, observe_all(self._dense, self._task, parts, sites, self.precision, self._thinned))

    def _thinned(self, _: int, reference: Reference) -> Reference:
        """The reference with the likeliest classes alone where there are many, as the first one has it."""
        outputs = reference.outputs
        if self.measure is None or not isinstance(outputs, Tensor):
            return reference
        if not self._classes:
            self._classes = [self.measure.kept_classes(outputs)]
        k = self._classes[0]
        return reference if k is None else replace(reference, outputs=TopClasses.of(outputs, self.measure.classes, k))

    def _shrink(self) -> bool:
        if self.halve_at_once():
            return True
        before = self.statistics.samples
        if before // 2 < FEWEST:
            return False
        self.statistics = self.statistics.first(before // 2)
        warnings.warn(
            f"the {before} statistics samples do not fit in memory at once: the first {before // 2} are used, and "
            "results differ from those with more memory",
            stacklevel=2,
        )
        return True
