"""After the search: which points are scored on validation and tuned, the exported front, and who won at each budget."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch

from autoprune import __version__
from autoprune.errors import RunError
from autoprune.evaluate import COSTS
from autoprune.evaluation import Ask, Evaluation
from autoprune.front import Front, Point, pareto_front
from autoprune.policy import Policy
from autoprune.setting import Setting

MAX_POINTS = 32
"""Points of the front that are scored on validation and exported."""
SLACK = 1e-9
Controls = Mapping[tuple[str, float], Policy]
Labelled = list[tuple[str, Ask]]


def final_asks(setting: Setting, told: Sequence[Evaluation], controls: Controls) -> Labelled:
    """Asks on validation: the dense model, the front of the search (thinned), the control arms."""
    problem = setting.problem
    full = [e for e in told if e.ok and e.ask.tier == problem.tier and e.ask.fraction == 1.0]
    inside = [e for e in full if e.costs[problem.budget.cost] <= problem.budget.high + SLACK]
    front = _thinned(pareto_front(inside, problem.objectives), setting)
    if not front:
        errors = [e.error for e in told if e.error][:1]
        raise RunError(f"no evaluation within the budget succeeded; the first error: {(errors or ['none'])[0]}")
    policies = {"dense": Policy.dense(setting.structure)}
    policies |= {f"front {e.ask.policy.digest}": e.ask.policy for e in front}
    policies |= {f"{arm}@{at:g}": policy for (arm, at), policy in controls.items()}
    return [(label, Ask(p, problem.tier, split="validation")) for label, p in policies.items()]


def tune_asks(setting: Setting, scored: Sequence[Evaluation], controls: Controls) -> Labelled:
    """The brief fine-tune of the points nearest below each asked budget, and of the control arms there."""
    part, at = setting.job.evaluator, setting.problem.budget.at
    if part.finalists == 0 or part.finetune_steps == 0 or not at:
        return []
    front, share = validated_front(setting, scored), max(1, part.finalists // len(at))
    chosen: dict[str, Policy] = {}
    for limit in at:
        fitting = [e for e in front if e.costs[setting.problem.budget.cost] <= limit + SLACK]
        for e in fitting[-share:]:
            chosen[f"finalist {e.ask.policy.digest}"] = e.ask.policy
    chosen |= {f"tuned {arm}@{limit:g}": policy for (arm, limit), policy in controls.items()}
    return [(label, Ask(p, "tune", split="validation")) for label, p in chosen.items()]


def validated_front(setting: Setting, scored: Iterable[Evaluation]) -> tuple[Evaluation, ...]:
    """The front on validation, within the budget range."""
    budget = setting.problem.budget
    inside = [e for e in scored if e.ok and e.costs[budget.cost] <= budget.high + SLACK]
    return pareto_front(inside, setting.problem.objectives)


def export_front(
    setting: Setting, scored: Sequence[Evaluation], tuned: Sequence[Evaluation], trials: Mapping[Policy, int]
) -> Front:
    """The Front of policy.json: points ascending in cost, with validation and fine-tuned metrics."""
    dense = next(e for e in scored if e.ask.policy == Policy.dense(setting.structure))
    base = replace(setting.base, metrics={"validation": dict(dense.metrics)})
    by_policy = {e.ask.policy: e for e in tuned if e.ok}
    points = []
    for i, e in enumerate(validated_front(setting, scored)):
        policy = e.ask.policy
        metrics = {"validation": _scores(setting, e)}
        if policy in by_policy:
            steps = {"steps": setting.job.evaluator.finetune_steps}
            metrics["finetuned"] = {**_scores(setting, by_policy[policy]), **steps}
        keep = {n: tuple(setting.database.keep(n, w).tolist()) for n, w in policy.widths}
        costs: dict[str, Any] = {c: round(e.costs[c] * base.costs[c]) for c in COSTS}
        costs["macs_ratio"] = e.costs["macs"]
        points.append(Point(f"p{i:02d}", policy, keep, costs, metrics, trials[policy], base))
    return Front(tuple(points), base, _measured_on(), _provenance(setting))


def summarise(
    setting: Setting, front: Front, scored: Sequence[Evaluation], tuned: Sequence[Evaluation], controls: Controls
) -> tuple[Mapping[str, Any], ...]:
    """Rows of the result table: at each asked budget the best point and the control arms, and a plain word on them."""
    plain = {e.ask.policy: e for e in scored if e.ok}
    fine = {e.ask.policy: e for e in tuned if e.ok}
    rows = []
    for at in setting.problem.budget.at:
        best = _best_at(setting, front, fine, at)
        arms = {"search": best.policy} if best is not None else {}
        arms |= {arm: policy for (arm, limit), policy in controls.items() if limit == at}
        note = _verdict(at, arms, plain, fine)
        for arm, policy in arms.items():
            row = _row(plain.get(policy), fine.get(policy))
            point = best.id if arm == "search" and best is not None else None
            rows.append({"budget": at, "arm": arm, "point": point, **row, "note": note})
    return tuple(rows)


def _best_at(setting: Setting, front: Front, fine: Mapping[Policy, Evaluation], at: float) -> Point | None:
    """The point of least tuned loss within the budget; of least loss where none was tuned."""
    cost = setting.problem.budget.cost
    fitting = [p for p in front if p.ratio(cost) <= at + SLACK]
    tuned = [p for p in fitting if p.policy in fine]
    if tuned:
        return min(tuned, key=lambda p: fine[p.policy].loss)
    return min(fitting, key=lambda p: p.metrics["validation"]["loss"], default=None)


def _verdict(
    at: float,
    arms: Mapping[str, Policy],
    plain: Mapping[Policy, Evaluation],
    fine: Mapping[Policy, Evaluation],
) -> str:
    """Says plainly when the search did not beat a control arm, judged after the fine-tune where there was one."""
    judged, what = (fine, "fine-tuned") if any(p in fine for p in arms.values()) else (plain, "validation")
    if "search" not in arms:
        return f"at {at:g}: the search found no point within the budget"
    losses = {arm: judged[p].loss for arm, p in arms.items() if p in judged}
    ours = losses.pop("search", float("inf"))
    better = {arm: loss for arm, loss in losses.items() if loss <= ours}
    if not better:
        rest = ", ".join(f"{arm} {loss:.4g}" for arm, loss in losses.items())
        return f"at {at:g}: search {ours:.4g} against {rest} ({what} loss)"
    rest = ", ".join(f"{arm} {loss:.4g}" for arm, loss in better.items())
    return f"at {at:g}: the search did NOT beat {rest}; it has {ours:.4g} ({what} loss)"


def _row(plain: Evaluation | None, fine: Evaluation | None) -> dict[str, Any]:
    if plain is None:
        return {"macs_ratio": None, "loss": None, "metrics": {}, "finetuned": None}
    tuned = {"loss": fine.loss, **fine.metrics} if fine is not None else None
    return {"macs_ratio": plain.costs["macs"], "loss": plain.loss, "metrics": dict(plain.metrics), "finetuned": tuned}


def _scores(setting: Setting, e: Evaluation) -> dict[str, float]:
    """Loss (also by its own name where it compares with the dense outputs) and metrics."""
    loss = setting.job.objectives.loss
    named: dict[str, float] = {loss: e.loss} if isinstance(loss, str) else {}
    return {"loss": e.loss, **named, **e.metrics}


def _thinned(front: Sequence[Evaluation], setting: Setting) -> list[Evaluation]:
    """At most MAX_POINTS, evenly along the front, the nearest below each asked budget among them."""
    cost, at = setting.problem.budget.cost, setting.problem.budget.at
    nearest = {max((i for i, e in enumerate(front) if e.costs[cost] <= limit + SLACK), default=-1) for limit in at}
    if len(front) > MAX_POINTS:
        step = (len(front) - 1) / (MAX_POINTS - 1)
        chosen = {round(k * step) for k in range(MAX_POINTS)} | (nearest - {-1})
        return [front[i] for i in sorted(chosen)]
    return list(front)


def _measured_on() -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": device, "threads": torch.get_num_threads(), "runtime": "eager", "versions": versions}


def _provenance(setting: Setting) -> dict[str, Any]:
    part = setting.job.search
    return {
        "autoprune": __version__,
        "job_sha256": setting.job.sha256,
        "sampler": part.sampler,
        "trials": part.trials,
        "seed": part.seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
