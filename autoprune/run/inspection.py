"""What `inspect` shows: groups and costs as plain values, and the sensitivity table, which a later search uses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from autoprune.allocation.knapsack import Allocator, penalties, predicted_loss
from autoprune.allocation.sensitivity import Table, TablePlan, load_table
from autoprune.codec import Codec
from autoprune.evaluation import Evaluation, Labelled
from autoprune.files.job import Job
from autoprune.matrices import WEIGHT
from autoprune.protocols import Step, Task
from autoprune.record.folder import new_folder
from autoprune.record.lock import locked
from autoprune.record.record import Record
from autoprune.run.before import measured_table
from autoprune.run.folder_checks import recorded_identity
from autoprune.run.loop import evaluate_all
from autoprune.run.pace import Pace
from autoprune.run.prepare import preparing
from autoprune.run.setting import Setting
from autoprune.space import OTHER_KIND
from autoprune.structure import Structure
from autoprune.tracing.inputs import described


def inspect_facts(structure: Structure, task: Task) -> dict[str, Any]:
    """What `inspect` shows, as plain values; a group's shares are those of the operations and parameters it scales.

    Those of a group of weights are its layer's; it has the `shape` of its matrix and its `pattern` too.
    """
    shapes = {t.name: t.shape for op in structure.ops for t in op.tensors}
    macs = {op.name: op.positions * math.prod(shapes[op.weight] if op.weight else ()) for op in structure.ops}
    numbers = {t.name: math.prod(t.shape) for op in structure.ops for t in op.tensors if t.is_parameter}
    total, params = max(sum(macs.values()), 1), sum(numbers.values())
    groups = []
    for group in structure:
        zeros = group.matrices if group.kind == WEIGHT else ()
        own = {*(s.tensor for s in group.slices), *zeros}
        scaled = [op for op in structure.ops if op.weight in own or (op.weight is None and group.name in op.groups)]
        shares = {
            "macs_share": sum(macs[op.name] for op in scaled) / total,
            "params_share": sum(n for name, n in numbers.items() if name in own) / max(params, 1),
        }
        facts = {"name": group.name, "kind": group.kind, "width": group.width, "grid": list(group.grid)}
        sparse = {"shape": list(shapes[group.matrices[0]]), "pattern": group.pattern} if zeros else {}
        groups.append({**facts, **sparse, **shares})
    shapes_in = [x["shape"] for x in described(task.example_inputs())]
    return {
        "fingerprint": structure.fingerprint,
        "inputs": shapes_in,
        "dense": {"macs": sum(macs.values()), "params": params},
        "groups": groups,
        "frozen": _frozen(structure),
    }


def _frozen(structure: Structure) -> dict[str, str]:
    """What is frozen and why, without modules whose own weight is searched where that says no more of them.

    It does where others are narrowed, and this one is not for a reason of its own.
    """
    weighed = {name.rpartition(".")[0] for g in structure if g.kind == WEIGHT for name in g.matrices}
    narrowed = any(g.narrows for g in structure)
    return {
        name: reason
        for name, reason in structure.frozen.items()
        if name not in weighed or (narrowed and not reason.startswith(OTHER_KIND))
    }


class Inspection:
    """Measures a job's sensitivity table in `folder`, or finds it there; iterate it for the evaluations.

    `done` of `total` counts evaluations; `table` is there afterwards.
    """

    def __init__(self, job: Job, folder: Path, task: Task | None = None) -> None:
        self.folder, self.stage, self.note, self.done, self.total = folder, "sensitivity table", "", 0.0, 1.0
        self._job, self._task, self._pace = job, task, Pace()
        self._made: Setting | None = None

    def preparing(self) -> Iterator[Step]:
        """Make it ready, step by step; nothing where that has happened."""
        if self._made is not None:
            return
        with new_folder(self.folder), locked(self.folder):
            recorded = recorded_identity(self._job, self.folder)
            steps = preparing(self._job, self.folder, self._task, recorded=recorded, priced=True)
            while self._made is None:
                try:
                    step = next(steps)
                except StopIteration as end:
                    self._made = end.value
                    continue
                self._pace.take(step)
                self.stage = step.stage
                yield step
        self.stage = "sensitivity table"

    @property
    def _setting(self) -> Setting:
        for _ in self.preparing():
            pass
        assert self._made is not None
        return self._made

    @property
    def path(self) -> Path:
        """The table's file."""
        return self._setting.table_path(self._plan)

    @property
    def _plan(self) -> TablePlan:
        return self._setting.table_plan(self._job.search.trials)

    @property
    def counted(self) -> str:
        """How far it is, in words."""
        return self._pace.counted if self._made is None else f"{self.done:.0f} of {self.total:.0f} evaluations"

    @property
    def said(self) -> tuple[str, ...]:
        """What a user ought to know of model and data."""
        return self._setting.said

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
