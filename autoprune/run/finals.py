"""The end of a run: the front held against other samples, its winners fine-tuned, the exported front and its files."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune.errors import OutOfTimeError
from autoprune.evaluation import Ask, Evaluation, Labelled
from autoprune.files.policy_file import save_csv, save_front
from autoprune.front import Front
from autoprune.policy import Policy
from autoprune.record.folder import write_event
from autoprune.run import after
from autoprune.run.before import control_policies
from autoprune.run.clock import Clock
from autoprune.run.exported import Finding, measured_on, points_of, provenance, scored_base, volume_facts
from autoprune.run.plan import Plan
from autoprune.run.setting import Setting
from autoprune.run.summary import Told, summarise
from autoprune.run.timed import time_parts

Evaluated = Callable[[str, Labelled], Generator[Evaluation, None, list[Evaluation]]]
"""Evaluates the asks of a stage; fewer come back where the time is over."""
Rows = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Finals:
    """What the final stages came to: evaluations by stage, the winner at each asked budget, the control arms."""

    held: Sequence[Evaluation]
    scored: Sequence[Evaluation]
    tuned: Sequence[Evaluation]
    winners: Mapping[float, Policy]
    controls: after.Controls


def finals(
    s: Setting, told: Sequence[Evaluation], controls: Sequence[str], evaluated: Evaluated, fit: Callable[[int], int]
) -> Generator[Evaluation, None, Finals]:
    """Re-rank the front on held-back samples, tune the finalists, score on validation.

    `fit` says for a number of finalists how many of them there is time for.

    Raises:
        OutOfTimeError: the time is over before any point was scored.
    """
    problem, constraints = s.problem, s.constraints
    arms = control_policies(problem, controls)
    n = after.n_finalists(s.job.evaluator.tuned_finalists, problem, s.prices, s.worth(e.ask for e in told))
    chosen = after.contenders(told, n, problem, constraints)
    held = yield from evaluated("held back", after.heldback_asks(told, chosen, problem, constraints))
    timely = fit(n)
    judged = yield from evaluated("finalists", after.finalist_asks({at: row[:timely] for at, row in chosen.items()}))
    ranked = after.reranked(told, held, problem.tier, s.prices)
    winners = after.winners(ranked, judged, problem.budget, constraints)
    scored = yield from evaluated("validation", after.validation_asks(ranked, winners, arms, problem))
    if len(scored) < 2:  # the dense model comes first
        raise OutOfTimeError("no point of the front could be scored in time")
    tunes = s.job.evaluator.tuned_finalists > 0
    tuned = yield from evaluated("fine-tuned", after.tuned_asks(winners, arms) if tunes else [])
    return Finals(held, scored, tuned, winners, arms)


def fitting(s: Setting, plan: Plan, clock: Clock, parallel: float, n: int) -> int:
    """Of `n` finalists at each budget those that leave time for the validation; all where nothing presses."""
    rest_s = plan.left_s(parallel, ("validation",))
    one = plan.seconds_of([Ask(Policy.dense(s.structure), "tune", split="heldback")], parallel)
    if rest_s is None or one is None:
        return n
    room = (clock.left_s - rest_s) / max(one * len(s.problem.budget.at), 1e-9)
    return max(0, min(n, int(min(room, n))))


def front_of(
    s: Setting, told: Sequence[Evaluation], found: Finals, remeasured: Callable[[list[Policy]], Mapping[Policy, Any]]
) -> tuple[Front, Rows]:
    """The front and the result table; `remeasured` measures the latencies of policies anew, where that was asked."""
    full = [(i, e) for i, e in enumerate(told) if e.ask.fraction == 1.0 and e.ask.tier == s.tier]
    trials = {e.ask.policy: i for i, e in reversed(full)}
    known = [e for e in found.scored if e.ask.policy in trials]  # alone, the dense model is never found
    chosen = after.exported(known, found.tuned, found.winners, found.controls, s.problem, s.constraints)
    trained = [e for e in chosen if e.ask.tier == "tune"]  # where that is the fitness, the front itself is tuned
    fine = {e.ask.policy: e for e in (*trained, *found.tuned) if e.ok}
    latencies = remeasured([*(e.ask.policy for e in chosen), *found.controls.values()])
    findings = [Finding(e, fine.get(p), trials[p], latencies.get(p)) for e in chosen for p in [e.ask.policy]]
    base = scored_base(s.base, found.scored[0], s.database)
    points = points_of(findings, base, s.database, s.settings)
    facts = provenance(s.job) | volume_facts(points, s.problem)
    parts = time_parts(s.problem)
    front = Front(points, base, measured_on(s.settings, s.latency, parts), facts)
    evaluations = (*told, *found.held, *found.scored, *found.tuned)
    seen = Told(front, found.winners, found.controls, evaluations, s.tier, latencies, parts)
    return front, summarise(seen, s.problem.budget.at)


def export(folder: Path, front: Front, rows: Rows, spent: Mapping[str, float]) -> None:
    """Write what a run ends with."""
    from autoprune.report import build_report

    save_front(front, folder / "policy.json")
    save_csv(front, folder / "front.csv")
    write_event(folder, "summary", {"rows": rows, "spent": spent})
    build_report(folder)
