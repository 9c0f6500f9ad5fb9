"""The sensitivity table on its own, for a look before a search, which finds and uses it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from autoprune.allocation import Allocator, penalties, predicted_loss
from autoprune.codec import Codec
from autoprune.evaluation import Evaluation, Labelled
from autoprune.job import Job
from autoprune.opening import with_table
from autoprune.protocols import Task
from autoprune.sensitivity import Table, load_table
from autoprune.setting import Setting, new_folder, prepare
from autoprune.study import Record, evaluate_all


class Inspection:
    """Measures a job's sensitivity table in `folder`, or finds it there; iterate it for the evaluations.

    `done` of `total` counts evaluations; `table` is there afterwards, `path` is its file.
    """

    def __init__(self, job: Job, folder: Path, task: Task | None = None) -> None:
        self.folder, self.stage, self.note, self.done, self.total = folder, "sensitivity table", "", 0.0, 1.0
        with new_folder(folder):
            self._setting: Setting = prepare(job, folder, task)
        self.path = self._setting.table_path

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

                for evaluation in with_table(s, evaluate):
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
