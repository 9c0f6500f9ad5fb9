"""All that an evaluator needs as one value that travels to other machines: task, data, dense model, level database."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from autoprune.costs._latency_table import LatencyTable
from autoprune.database.batches import Parts, in_format
from autoprune.database.entries import Entries
from autoprune.database.levels import Levels
from autoprune.database.store import LevelDatabase
from autoprune.evaluator.memory import bound_kernel_cache, keep_blocks
from autoprune.evaluator.prepared import fitted, prepared_model, prepared_parts
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.files.held import SharedFolder
from autoprune.files.machine import usable_cores
from autoprune.protocols import Task
from autoprune.structure import Structure


@dataclass(frozen=True)
class Shipment:
    """An evaluator's parts on the CPU; called where it has arrived, it builds the evaluator on that machine's device.

    Nothing writes to its tensors, so that the workers of a machine may share one copy. So they do the entries that they
    make of the database, in a folder of that machine `named` for all that this shipment becomes.
    """

    task: Task
    structure: Structure
    levels: Mapping[str, Levels]
    settings: Settings
    model: nn.Module
    parts: Parts
    latency: LatencyTable | None = None
    named: str = field(default_factory=partial(secrets.token_hex, 8))

    @staticmethod
    def of(
        task: Task,
        structure: Structure,
        database: LevelDatabase,
        settings: Settings,
        latency: LatencyTable | None = None,
        parts: Parts | None = None,
    ) -> Shipment:
        """Pack; the model, and data that is not at hand, are prepared here, once for all workers."""
        here = settings.on("cpu")
        model = prepared_model(task, here.torch_device)
        parts = prepared_parts(task, here, model) if parts is None else replace(parts, folder=None)
        return Shipment(task, structure, database.levels, settings, model, parts, latency)

    def __call__(self) -> TieredEvaluator:
        """Build the evaluator."""
        bound_kernel_cache(self.structure)
        keep_blocks()
        device = self.settings.torch_device
        model = in_format(self.model.to(device).eval(), self.parts.layout)
        database = LevelDatabase(self.levels, self._entries())
        parts = fitted(self.parts, self.task, self.settings, model)
        return TieredEvaluator(self.task, self.structure, database, self.settings, model, self.latency, parts)

    def _entries(self) -> Entries:
        """Those of this machine, or a core's share of them where its temporary files cannot be written to."""
        try:
            return Entries(self.settings.memory, SharedFolder(self.named))
        except OSError:
            return Entries(self.settings.memory // usable_cores())
