"""The price of a container: what the same allocation loses within it and without it, on the same samples.

Both sides are the knapsack at each asked budget, by sensitivity tables of the same tier and samples, or the last
control arm where nothing was tabled: a search of the container's space against a mere allocation of the whole one would
compare two searchers. The whole space shares the level database, and the rows of the table of all groups that the
container leaves as they are; what it lacks is measured, for no more than a share of what the search may spend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from autoprune.allocation.sensitivity import Table, TablePlan, table_asks, table_of
from autoprune.costs import build_cost
from autoprune.deploy import same
from autoprune.errors import OutOfTimeError
from autoprune.estimates import LEVEL, crossed
from autoprune.evaluation import Ask, Evaluation, Labelled, Tier
from autoprune.executors._lazy import Lazy
from autoprune.policy import Policy
from autoprune.record.record import Record, Stage
from autoprune.run.before import control_policies, usable
from autoprune.run.clock import Clock
from autoprune.run.loop import evaluate_all
from autoprune.run.plan import Plan
from autoprune.run.setting import Setting
from autoprune.run.summary import figures

FOLDER, WITHOUT, TABLED = "price", "onnx", "knapsack"
"""Where the evaluations of the whole space are recorded; the container that holds it; the arm by a table."""
HELD, TABLE, WHOLE = "price: within the container", "price: sensitivity table", "price: without it"
STAGES = (HELD, TABLE, WHOLE)
"""What the stages are called while they run."""
SHARE = 0.25
"""Of the search's ledger, at most, for rows of the table that the container has not."""
Row = Mapping[str, Any]
Pair = tuple[Evaluation, Evaluation]
"""Within the container, and without it."""


def held_asks(s: Setting) -> Labelled:
    """The container's side, on validation; nothing where no price is to be measured."""
    arm = arm_of(s)
    return [] if arm is None else arm_asks(s, arm)


def arm_of(s: Setting) -> str | None:
    """By what both sides are allocated; None where there is nothing to compare."""
    if s.whole is None or s.latency is not None:  # a latency is predicted for the space that it was measured over
        return None
    arms = [TABLED] if s.problem.table is not None else list(usable(s.controls, s.whole))
    return arms[-1] if arms else None


def arm_asks(s: Setting, arm: str) -> Labelled:
    """An arm at the asked budgets on validation, also fine-tuned where the finalists are."""
    policies = control_policies(s.problem, [arm])
    tiers: tuple[Tier, ...] = (s.tier, *(("tune",) if s.job.evaluator.tuned_finalists and s.tier != "tune" else ()))
    return [
        (f"{arm}@{at:g}", Ask(policy, tier, split="validation"))
        for tier in tiers
        for (_, at), policy in policies.items()
    ]


class Pricing:
    """Measures the whole space's side; iterate it for the evaluations, `rows` is there afterwards.

    `held` are the answers to `held_asks`, `tabled` is how the container's table was measured, where there is one.
    `executor` starts with the first ask; None where there is nothing to measure.
    """

    def __init__(
        self, s: Setting, folder: Path, held: Sequence[Evaluation], tabled: TablePlan | None, plan: Plan, clock: Clock
    ) -> None:
        self._s, self._folder, self._held, self._tabled = s, folder, held, tabled
        self._plan, self._clock = plan, clock
        self._whole = without_container(s) if held else None
        self.executor = None if self._whole is None else Lazy(self._whole.executor)
        self.stage, self.note = TABLE, ""
        self.rows: tuple[Row, ...] = ()

    def __iter__(self) -> Iterator[Evaluation]:
        s, arm, whole = self._s, arm_of(self._s), self._whole
        if arm is None or whole is None or self.executor is None:
            return
        with (
            Record(self._folder / FOLDER, whole.structure, s.problem.objectives, s.tier, s.identity) as record,
            closing(self.executor) as executor,
        ):

            def evaluated(name: str, stage: Stage, asks: Labelled) -> Iterator[Evaluation]:
                self.stage = name
                self._plan.expect(name, asks)
                return evaluate_all(record, executor, asks, stage, self._clock)

            try:
                if s.problem.table is not None and self._tabled is not None:
                    plan, answers = affordable(s, whole, self._tabled), list[Evaluation]()
                    for evaluation in evaluated(TABLE, "table", missing_asks(s, whole, plan)):
                        answers.append(evaluation)
                        yield evaluation
                    whole = whole.with_table(joined_table(s, whole, answers))
                found = list[Evaluation]()
                for evaluation in evaluated(WHOLE, "final", arm_asks(whole, arm)):
                    found.append(evaluation)
                    yield evaluation
                self.rows = rows_of(s, arm, self._held, found)
            except OutOfTimeError:
                self.note = f"the time limit ended the stage {self.stage!r}; the same command goes on"


def without_container(s: Setting) -> Setting | None:
    """The setting over all that the job would search without its container, on the same level database."""
    if s.whole is None:
        return None
    costs = {name: build_cost(name, s.whole, s.latency) for name in s.problem.costs}
    scores = s.database.scores(s.whole)
    problem = replace(s.problem, structure=s.whole, costs=costs, scores=scores, table=None, seeds=())
    return replace(s, structure=s.whole, problem=problem, whole=None)


def affordable(s: Setting, whole: Setting, tabled: TablePlan) -> TablePlan:
    """The container's plan, at as many widths of what is missing as a share of the ledger pays for; at one at least."""
    plans = [replace(tabled, n_widths=n) for n in range(tabled.n_widths, 0, -1)]
    room = SHARE * s.job.search.trials
    return next((p for p in plans if whole.worth(ask for _, ask in missing_asks(s, whole, p)) <= room), plans[-1])


def missing_asks(s: Setting, whole: Setting, plan: TablePlan) -> Labelled:
    """What the container's table does not tell of the whole space; of the dense model it tells."""
    known = _known(s, whole)
    return [
        (label, ask) for label, ask in table_asks(whole.structure, plan)[1:] if label.rpartition("=")[0] not in known
    ]


def joined_table(s: Setting, whole: Setting, answers: Sequence[Evaluation]) -> Table:
    """The table of the whole space: the container's rows of groups that it leaves as they are, and the `answers`."""
    table = s.problem.table or {}
    losses = [row[s.structure.group(name).width] for name, row in table.items() if name in s.structure.names]
    ask = Ask(Policy.dense(whole.structure), whole.tier)
    return {**table_of(whole.structure, [Evaluation(ask, losses[0]), *answers]), **_known(s, whole)}


def _known(s: Setting, whole: Setting) -> dict[str, Mapping[int, float]]:
    """Rows of groups that both spaces have, whatever widths of them the container allows."""
    table, held = s.problem.table or {}, {g.name: g for g in s.structure}
    return {g.name: table[g.name] for g in whole.structure if g.name in table and same(g, held[g.name])}


def rows_of(s: Setting, arm: str, held: Sequence[Evaluation], found: Sequence[Evaluation]) -> tuple[Row, ...]:
    """For each asked budget both sides, the difference of their losses with its interval over samples, a sentence."""
    n = len(s.problem.budget.at)
    both = list(zip(held, found, strict=False))
    tuned: Sequence[Pair | None] = both[n:] or [None] * n
    return tuple(_row(s, arm, *given) for given in zip(s.problem.budget.at, both[:n], tuned, strict=False))


def told(rows: Sequence[Row], price: Sequence[Row]) -> tuple[Row, ...]:
    """The rows of the result table with both sides of the price at each budget, as two arms of their own."""
    found = []
    for at in dict.fromkeys([*(row["budget"] for row in rows), *(row["budget"] for row in price)]):
        found += [row for row in rows if row["budget"] == at]
        for row in (row for row in price if row["budget"] == at):
            for container, figures_ in ((row["container"], row["within"]), (row["without"], row["whole"])):
                arm = f"{row['arm']} in {container}"
                found.append({"budget": at, "arm": arm, "point": None, **figures_, "beat": None, "note": row["text"]})
    return tuple(found)


def _row(s: Setting, arm: str, at: float, plain: Pair, tuned: Pair | None) -> Row:
    judged, container = tuned or plain, str(s.job.deploy)
    scored = [[e if e is not None and e.ok else None for e in pair] for pair in (plain, tuned or (None, None))]
    sides = [figures(a, b) for a, b in zip(*scored, strict=True)]
    row: dict[str, Any] = {
        "budget": at,
        "arm": arm,
        "container": container,
        "without": WITHOUT,
        "tier": judged[0].ask.tier,
    }
    row |= {"within": sides[0], "whole": sides[1], "price": None, "low": None, "high": None, "samples": 0}
    failed = next((e for e in judged if not e.ok), None)
    if failed is not None:
        return {**row, "text": f"no price of {container} at {at:g}: {arm} cannot be scored ({failed.error})"}
    losses, singles = [e.loss for e in judged], [e.sample_losses for e in judged]
    row["price"], within = losses[0] - losses[1], ""
    if singles[0] and len(singles[0]) == len(singles[1]):
        _, low, high = crossed([np.subtract(singles[0], singles[1])])
        row |= {"low": low, "high": high, "samples": len(singles[0])}
        within = f", {100 * LEVEL:g} % interval [{low:+.3g}, {high:+.3g}] over {len(singles[0])} samples"
    shown = row["price"] > 0 and (row["low"] is None or row["low"] > 0)
    costs = " and ".join(f"{e.costs[s.problem.budget.cost]:.3g}" for e in plain)
    what = f"loss on validation{', fine-tuned' if tuned else ''}; {s.problem.budget.cost} {costs}"
    text = f"{arm} has {losses[0]:.4g} in it and {losses[1]:.4g} in {WITHOUT}, which holds everything"
    end = f": {row['price']:+.3g}{within}" + ("" if shown else ", which shows no price")
    return {**row, "text": f"price of {container} at {at:g}: {text}{end} ({what})"}
