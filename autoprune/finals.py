"""After the search: re-ranking on held-back samples, validation, finalists, the exported front, and who won where.

Fitness samples choose the front, the held-back part thins it and picks the winners, validation reports them.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch

from autoprune import __version__
from autoprune.errors import RunError
from autoprune.evaluate import COSTS, Settings
from autoprune.evaluation import Ask, Evaluation, Split, Tier
from autoprune.front import Front, Point, pareto_front
from autoprune.policy import Policy
from autoprune.setting import Setting

MAX_POINTS = 32
"""Points of the front that are scored on validation and exported; the nearest below an asked budget come on top."""
SLACK = 1e-9
Controls = Mapping[tuple[str, float], Policy]
Labelled = list[tuple[str, Ask]]


@dataclass(frozen=True)
class Told:
    """What the result table is made of: the front, the winner at each asked budget, the arms, all evaluations."""

    front: Front
    winners: Mapping[float, Policy]
    controls: Controls
    evaluations: Sequence[Evaluation]

    def find(self, policy: Policy | None, split: Split, tier: Tier) -> Evaluation | None:
        """The full evaluation of `policy` at `tier` on `split`, if it succeeded."""
        ask = Ask(policy, tier, split=split) if policy is not None else None
        return next((e for e in self.evaluations if e.ok and e.ask == ask), None)


def heldback_asks(setting: Setting, told: Sequence[Evaluation]) -> Labelled:
    """The front of the search, thinned, on the samples that no stage used: against the winner's curse."""
    problem = setting.problem
    full = [e for e in told if e.ok and e.ask.tier == problem.tier and e.ask.fraction == 1.0]
    front = _thinned(pareto_front(_within(setting, full), problem.objectives), setting)
    if not front:
        errors = [e.error for e in told if e.error][:1]
        raise RunError(f"no evaluation within the budget succeeded; the first error: {(errors or ['none'])[0]}")
    return [(f"front {e.ask.policy.digest}", Ask(e.ask.policy, problem.tier, split="heldback")) for e in front]


def validation_asks(setting: Setting, held: Sequence[Evaluation], controls: Controls) -> Labelled:
    """The dense model, the front as the held-back samples see it, and the control arms, on validation."""
    tier = setting.tier
    asks = [("dense", Ask(Policy.dense(setting.structure), "refit", split="validation"))]
    front = pareto_front([e for e in held if e.ok], setting.problem.objectives)
    asks += [(f"front {e.ask.policy.digest}", Ask(e.ask.policy, tier, split="validation")) for e in front]
    asks += [(f"{arm}@{at:g}", Ask(p, tier, split="validation")) for (arm, at), p in controls.items()]
    return asks


def finalist_asks(setting: Setting, scored: Sequence[Evaluation]) -> Labelled:
    """The brief fine-tune of the points nearest below each asked budget, judged on held-back samples."""
    part, at = setting.job.evaluator, setting.problem.budget.at
    if part.finalists == 0 or part.finetune_steps == 0 or not at:
        return []
    share, chosen = max(1, part.finalists // len(at)), dict[str, Policy]()
    for limit in at:
        for e in _fitting(setting, validated_front(setting, scored), limit)[-share:]:
            chosen[f"finalist {e.ask.policy.digest}"] = e.ask.policy
    return [(label, Ask(p, "tune", split="heldback")) for label, p in chosen.items()]


def winners(setting: Setting, scored: Sequence[Evaluation], tuned: Sequence[Evaluation]) -> dict[float, Policy]:
    """At each asked budget the finalist of least tuned loss on held-back samples; where none was tuned, the widest."""
    losses = {e.ask.policy: e.loss for e in tuned if e.ok}
    found = {}
    for limit in setting.problem.budget.at:
        fitting = [e.ask.policy for e in _fitting(setting, validated_front(setting, scored), limit)]
        finalists = [p for p in fitting if p in losses]
        if fitting:
            found[limit] = min(finalists, key=lambda p: losses[p]) if finalists else fitting[-1]
    return found


def tuned_asks(setting: Setting, chosen: Mapping[float, Policy], controls: Controls) -> Labelled:
    """The brief fine-tune of the winners and the control arms, on validation: what is reported."""
    part = setting.job.evaluator
    if part.finalists == 0 or part.finetune_steps == 0:
        return []
    policies = {f"tuned search@{at:g}": p for at, p in chosen.items()}
    policies |= {f"tuned {arm}@{at:g}": p for (arm, at), p in controls.items()}
    return [(label, Ask(p, "tune", split="validation")) for label, p in policies.items()]


def validated_front(setting: Setting, scored: Iterable[Evaluation]) -> tuple[Evaluation, ...]:
    """The front on validation, within the budget range."""
    return pareto_front(_within(setting, scored), setting.problem.objectives)


def export_front(
    setting: Setting, scored: Sequence[Evaluation], tuned: Sequence[Evaluation], trials: Mapping[Policy, int]
) -> Front:
    """The Front of policy.json: points ascending in cost, with validation and fine-tuned metrics.

    Control arms appear where the search told them as seeds and no other point beats them.
    """
    dense = next(e for e in scored if e.ask.policy == Policy.dense(setting.structure))
    if not dense.ok:
        raise RunError(f"the dense model fails on validation: {dense.error}")
    base = replace(setting.base, metrics={"validation": dict(dense.metrics)})
    by_policy = {e.ask.policy: e for e in tuned if e.ok}
    points: list[Point] = []
    for e in validated_front(setting, scored):
        policy = e.ask.policy
        metrics = {"validation": _scores(setting, e)}
        if policy in by_policy:
            steps = {"steps": setting.job.evaluator.finetune_steps}
            metrics["finetuned"] = {**_scores(setting, by_policy[policy]), **steps}
        keep = {n: tuple(setting.database.keep(n, w).tolist()) for n, w in policy.widths}
        costs: dict[str, Any] = {c: round(e.costs[c] * base.costs[c]) for c in COSTS}
        costs["macs_ratio"] = e.costs["macs"]
        points.append(Point(f"p{len(points):02d}", policy, keep, costs, metrics, trials[policy], base))
    return Front(tuple(points), base, _measured_on(setting), _provenance(setting))


def summarise(setting: Setting, told: Told) -> tuple[Mapping[str, Any], ...]:
    """Rows of the result table: at each asked budget the winner and the control arms, and a plain word on them."""
    rows = []
    ids = {p.policy: p.id for p in told.front}
    for at in setting.problem.budget.at:
        arms = {"search": told.winners[at]} if at in told.winners else {}
        arms |= {arm: policy for (arm, limit), policy in told.controls.items() if limit == at}
        note = _verdict(setting, told, at, arms)
        for arm, policy in arms.items():
            plain, fine = told.find(policy, "validation", setting.tier), told.find(policy, "validation", "tune")
            point = ids.get(policy) if arm == "search" else None
            rows.append({"budget": at, "arm": arm, "point": point, **_row(plain, fine), "note": note})
    return tuple(rows)


def _verdict(setting: Setting, told: Told, at: float, arms: Mapping[str, Policy]) -> str:
    """Says plainly when the search did not beat a control arm, after the fine-tune where there was one; and the gap."""
    if "search" not in arms:
        return f"at {at:g}: the search found no point within the budget"
    tuned = told.find(arms["search"], "validation", "tune") is not None
    tier: Tier = "tune" if tuned else setting.tier
    losses = {arm: e.loss for arm, p in arms.items() if (e := told.find(p, "validation", tier)) is not None}
    ours = losses.pop("search", float("inf"))
    better = {arm: loss for arm, loss in losses.items() if loss <= ours}
    rest = ", ".join(f"{arm} {loss:.4g}" for arm, loss in (better or losses).items())
    what = f"loss on validation{', fine-tuned' if tuned else ''}"
    seen = [(name, told.find(arms["search"], split, setting.tier)) for name, split in GAP]
    gap = ", ".join(f"{name} {e.loss:.4g}" for name, e in seen if e is not None)
    verdict = (
        f"search {ours:.4g} against {rest}" if not better else f"the search did NOT beat {rest}: it has {ours:.4g}"
    )
    return f"at {at:g}: {verdict} ({what}); before fine-tuning, the search's point: {gap}"


GAP: tuple[tuple[str, Split], ...] = (("fitness", "fitness"), ("held back", "heldback"), ("validation", "validation"))


def _row(plain: Evaluation | None, fine: Evaluation | None) -> dict[str, Any]:
    if plain is None:
        return {"macs_ratio": None, "loss": None, "metrics": {}, "finetuned": None}
    tuned = {**fine.metrics, "loss": fine.loss} if fine is not None else None
    return {"macs_ratio": plain.costs["macs"], "loss": plain.loss, "metrics": dict(plain.metrics), "finetuned": tuned}


def _scores(setting: Setting, e: Evaluation) -> dict[str, float]:
    """Metrics and the loss, the latter also by its own name where it compares with the dense outputs."""
    loss = setting.job.objectives.loss
    named: dict[str, float] = {loss: e.loss} if isinstance(loss, str) else {}
    return {**e.metrics, **named, "loss": e.loss}


def _within(setting: Setting, evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """Those that succeeded inside the budget range."""
    budget = setting.problem.budget
    return [e for e in evaluations if e.ok and e.costs[budget.cost] <= budget.high + SLACK]


def _fitting(setting: Setting, front: Sequence[Evaluation], limit: float) -> list[Evaluation]:
    """Those of an ascending front that cost at most `limit`."""
    return [e for e in front if e.costs[setting.problem.budget.cost] <= limit + SLACK]


def _thinned(front: Sequence[Evaluation], setting: Setting) -> list[Evaluation]:
    """MAX_POINTS evenly along the front, and the nearest below each asked budget."""
    if len(front) <= MAX_POINTS:
        return list(front)
    nearest = {len(_fitting(setting, front, limit)) - 1 for limit in setting.problem.budget.at}
    step = (len(front) - 1) / (MAX_POINTS - 1)
    return [front[i] for i in sorted({round(k * step) for k in range(MAX_POINTS)} | (nearest - {-1}))]


def _measured_on(setting: Setting) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    on_gpu = Settings.of(setting.job).torch_device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    return {"device": device, "threads": 1, "runtime": "eager", "versions": versions}


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
