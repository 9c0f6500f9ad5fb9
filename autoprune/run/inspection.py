"""What `inspect` shows: groups and costs as plain values, and the sensitivity table, which a later search uses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from autoprune.allocation.knapsack import Allocator, penalties, predicted_loss
from autoprune.allocation.sensitivity import Table, load_table
from autoprune.codec import Codec
from autoprune.evaluation import Evaluation, Labelled
from autoprune.files.job import Job
from autoprune.protocols import Task
from autoprune.record.folder import new_folder
from autoprune.record.lock import locked
from autoprune.record.record import Record
from autoprune.run.before import measured_table
from autoprune.run.loop import evaluate_all
from autoprune.run.prepare import prepare
from autoprune.run.setting import Setting
from autoprune.structure import Structure
from autoprune.tracing.inputs import described


def inspect_facts(structure: Structure, task: Task) -> dict[str, Any]:
    """What `inspect` shows, as plain values; a group's share is that of the operations that it scales."""
    shapes = {t.name: t.shape for op in structure.ops for t in op.tensors}
    macs = {op.name: op.positions * math.prod(shapes[op.weight] if op.weight else ()) for op in structure.ops}
    total = max(sum(macs.values()), 1)
    groups = []
    for group in structure:
        own = {s.tensor for s in group.slices}
        share = sum(macs[op.name] for op in structure.ops if op.weight in own) / total
        facts = {"name": group.name, "kind": group.kind, "width": group.width, "grid": list(group.grid)}
        groups.append({**facts, "macs_share": share})
    params = sum(math.prod(t.shape) for op in structure.ops for t in op.tensors if t.is_parameter)
    shapes_in = [x["shape"] for x in described(task.example_inputs())]
    return {
        "fingerprint": structure.fingerprint,
        "inputs": shapes_in,
        "dense": {"macs": sum(macs.values()), "params": params},
        "groups": groups,
        "frozen": dict(structure.frozen),
    }


class Inspection:
    """Measures a job's sensitivity table in `folder`, or finds it there; iterate it for the evaluations.

    `done` of `total` counts evaluations; `table` is there afterwards, `path` is its file.
    """

    def __init__(self, job: Job, folder: Path, task: Task | None = None) -> None:
        self.folder, self.stage, self.note, self.done, self.total = folder, "sensitivity table", "", 0.0, 1.0
        with new_folder(folder), locked(folder):
            self._setting: Setting = prepare(job, folder, task)
        self._plan = self._setting.table_plan(job.search.trials)
        self.path = self._setting.table_path(self._plan)

    def facts(self) -> dict[str, Any]:
        """`inspect_facts` of the job's model, which is analysed already."""
        return inspect_facts(self._setting.structure, self._setting.task)

    def __iter__(self) -> Iterator[Evaluation]:
        s = self._setting
        if load_table(self.path) is not None:
            return
        executor = s.executor()
        try:
            with Record(
                self.folder, s.structure, s.problem.objectives, s.tier, s.identity, s.job.storage_url
            ) as record:

                def evaluate(asks: Labelled) -> Iterator[Evaluation]:
                    self.total = float(len(asks))
                    return evaluate_all(record, executor, asks, "table")

                for evaluation in measured_table(s.structure, self.path, self._plan, evaluate):
                    self.done += 1
                    yield evaluation
        finally:
            executor.close()

    def predicted(self) -> list[tuple[float, float]]:
        """(ratio of the budget's cost, predicted loss), narrow to dense: one sweep of the knapsack over the table."""
        problem = replace(self._setting.problem, table=self.table)
        budget, prices, codec = problem.budget, penalties(problem), Codec(problem.structure)
        positions = np.stack(Allocator(problem.structure, problem.costs).front(prices, budget.cost, budget.limits))
        costs = problem.costs[budget.cost](codec.widths(positions))
        return [(float(c), float(loss)) for c, loss in zip(costs, predicted_loss(prices, positions), strict=True)]

    @property
    def table(self) -> Table:
        """{group: {width: loss}}; measures it where that has not happened."""
        for _ in self:
            pass
        table = load_table(self.path)
        assert table is not None
        return table
