"""After the search: re-ranking on held-back samples, finalists, validation, the exported front, and who won where.

Fitness samples choose the front and the contenders at each asked budget; with the held-back samples beside them they
thin the front and choose each budget's winner, or the held-back ones alone do after the brief fine-tune; validation
reports, and no choice of the search has seen it.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch

from autoprune import __version__
from autoprune.database.store import LevelDatabase
from autoprune.errors import NoPointError, RunError
from autoprune.estimates import loss_interval
from autoprune.evaluation import Ask, Evaluation, Labelled, Split, Tier
from autoprune.evaluator.prepared import prepared_model
from autoprune.evaluator.settings import COSTS
from autoprune.front import Front, Point
from autoprune.latency.calibrate import remeasure
from autoprune.pareto import front_volume, pareto_front, reference_point, thinned
from autoprune.policy import Policy
from autoprune.run.constraints import Constraint, kept
from autoprune.run.setting import Setting
from autoprune.structure import Group

MAX_POINTS = 32
"""Points of the front that are scored on validation and exported; the contenders of the asked budgets come on top."""
MAX_FINALISTS = 16
SLACK = 1e-9
Controls = Mapping[tuple[str, float], Policy]


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


def n_finalists(setting: Setting, spent: float) -> int:
    """Finalists at each asked budget: the job's number, and up to 16 until tuning has a third of the whole ledger."""
    part, at = setting.job.evaluator, setting.problem.budget.at
    if part.finalists == 0 or part.finetune_steps == 0 or not at:
        return 0
    price = setting.price(Ask(Policy.dense(setting.structure), "tune", split="heldback"))
    third = math.ceil(spent / 2 / (price * len(at)))
    return max(part.finalists, min(MAX_FINALISTS, third))


def contenders(setting: Setting, told: Sequence[Evaluation], n: int) -> dict[float, list[Policy]]:
    """At each asked budget the `n` distinct policies of least fitness loss within it."""
    full = sorted(_full(setting, told), key=lambda e: e.loss)
    cost = setting.problem.budget.cost
    return {
        at: list(dict.fromkeys(e.ask.policy for e in full if e.costs[cost] <= at + SLACK))[:n]
        for at in setting.problem.budget.at
    }


def heldback_asks(setting: Setting, told: Sequence[Evaluation], chosen: Mapping[float, list[Policy]]) -> Labelled:
    """The front of the search, thinned, and the contenders on samples that no stage used: against the winner's curse.

    Raises:
        RunError: nothing within the budget succeeded.
    """
    problem = setting.problem
    front = _thinned(pareto_front(_full(setting, told), problem.objectives), setting)
    if not front:
        errors = [e.error for e in told if e.error][:1]
        raise RunError(f"no evaluation within the budget succeeded; the first error: {(errors or ['none'])[0]}")
    policies = dict.fromkeys([*(e.ask.policy for e in front), *(p for row in chosen.values() for p in row)])
    return [(f"front {p.digest}", Ask(p, problem.tier, split="heldback")) for p in policies]


def finalist_asks(chosen: Mapping[float, list[Policy]]) -> Labelled:
    """The brief fine-tune of the contenders, judged on held-back samples."""
    policies = dict.fromkeys(p for row in chosen.values() for p in row)
    return [(f"finalist {p.digest}", Ask(p, "tune", split="heldback")) for p in policies]


def reranked(setting: Setting, told: Iterable[Evaluation], held: Iterable[Evaluation]) -> list[Evaluation]:
    """The held-back evaluations with the mean loss over fitness and held-back samples together.

    Fitness alone flatters what it has chosen. The fewer held-back samples alone are the noisier: among the best of a
    ResNet-20 search their ranks agreed less with those on 6 000 unseen images than the ranks on both.
    """
    known, prices = {e.ask.policy: e.loss for e in _whole(setting, told)}, setting.prices
    share = prices.heldback / (prices.fitness + prices.heldback)
    seen = [(e, known.get(e.ask.policy, e.loss)) for e in held if e.ok]
    return [replace(e, loss=share * e.loss + (1 - share) * loss) for e, loss in seen]


def winners(setting: Setting, ranked: Sequence[Evaluation], tuned: Sequence[Evaluation]) -> dict[float, Policy]:
    """At each asked budget the policy of least loss: on held-back samples after the fine-tune where one succeeded."""
    cost, found = setting.problem.budget.cost, {}

    def within(limit: float, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        return [e for e in evaluations if e.ok and e.costs[cost] <= limit + SLACK]

    for limit in setting.problem.budget.at:
        fitting = within(limit, tuned) or within(limit, ranked)
        feasible = [e for e in fitting if kept(setting.constraints, e.metrics)] or fitting
        if feasible:
            found[limit] = min(feasible, key=lambda e: e.loss).ask.policy
    return found


def validation_asks(
    setting: Setting, ranked: Sequence[Evaluation], chosen: Mapping[float, Policy], controls: Controls
) -> Labelled:
    """The dense model, the front as the re-ranking sees it, the winners and the control arms, on validation."""
    tier = setting.tier
    front = pareto_front(ranked, setting.problem.objectives)
    policies = {Policy.dense(setting.structure): "dense"}
    for policy in (*(e.ask.policy for e in front), *chosen.values()):
        policies.setdefault(policy, f"front {policy.digest}")
    asks = [(label, Ask(p, "refit" if label == "dense" else tier, split="validation")) for p, label in policies.items()]
    return asks + [(f"{arm}@{at:g}", Ask(p, tier, split="validation")) for (arm, at), p in controls.items()]


def tuned_asks(setting: Setting, chosen: Mapping[float, Policy], controls: Controls) -> Labelled:
    """The brief fine-tune of the winners and the control arms, on validation: what is reported."""
    part = setting.job.evaluator
    if part.finalists == 0 or part.finetune_steps == 0:
        return []
    policies = {f"tuned search@{at:g}": p for at, p in chosen.items()}
    policies |= {f"tuned {arm}@{at:g}": p for (arm, at), p in controls.items()}
    return [(label, Ask(p, "tune", split="validation")) for label, p in policies.items()]


def exported(
    setting: Setting,
    scored: Sequence[Evaluation],
    tuned: Sequence[Evaluation],
    chosen: Mapping[float, Policy],
    controls: Controls,
) -> tuple[Evaluation, ...]:
    """The evaluations on validation that make the front: none dominated, all constraints kept, every winner in it.

    Fine-tuning has judged the search's points within a budget, so none stays that only looked better before it.

    Raises:
        NoPointError: no point keeps the constraints.
    """
    problem, fine = setting.problem, {e.ask.policy: e for e in tuned if e.ok}
    within = [e for e in scored if e.ok and e.costs[problem.budget.cost] <= problem.budget.high + SLACK]
    fit = [e for e in within if _feasible(setting.constraints, e, fine.get(e.ask.policy))]
    if within and not fit:
        raise NoPointError(_missed(setting.constraints, [*within, *fine.values()]))
    won = [e for e in fit if e.ask.policy in set(chosen.values())]
    standing = {*chosen.values(), *controls.values()}
    left_out = _outdone(setting, fit, chosen) - standing if tuned and len(problem.objectives) == 1 else set()
    front = pareto_front([e for e in fit if e.ask.policy not in left_out], problem.objectives)
    merged = {e.ask.policy: e for e in (*front, *won)}
    return tuple(sorted(merged.values(), key=lambda e: (e.costs[problem.objectives[0]], e.loss)))


def export_front(
    setting: Setting,
    points: Sequence[Evaluation],
    dense: Evaluation,
    tuned: Sequence[Evaluation],
    trials: Mapping[Policy, int],
    latencies: Mapping[Policy, Mapping[str, float]],
) -> Front:
    """The Front of policy.json: points ascending in cost, with validation and fine-tuned metrics.

    Control arms appear where the search told them as seeds and no other point beats them.
    """
    if not dense.ok:
        raise RunError(f"the dense model fails on validation: {dense.error}")
    order = {g.name: ranking(setting.database, g) for g in setting.structure}
    base = replace(setting.base, metrics={"validation": dict(dense.metrics)}, order=order)
    trained = [e for e in points if e.ask.tier == "tune"]  # where that is the fitness, the front itself is tuned
    fine, made = {e.ask.policy: e for e in (*trained, *tuned) if e.ok}, list[Point]()
    for e in points:
        policy = e.ask.policy
        told = {"validation": e, **({"finetuned": fine[policy]} if policy in fine else {})}
        keep = {n: tuple(setting.database.keep(n, w).tolist()) for n, w in policy.widths}
        costs: dict[str, Any] = {c: _absolute(c, e.costs[c] * dense_cost) for c, dense_cost in base.costs.items()}
        costs["macs_ratio"] = e.costs["macs"]
        if policy in latencies:
            costs["latency"] = dict(latencies[policy])
        point = Point(
            f"p{len(made):02d}",
            policy,
            keep,
            costs,
            losses={split: told_loss(setting, found) for split, found in told.items()},
            metrics={split: dict(found.metrics) for split, found in told.items()},
            trial=trials[policy],
            base=base,
            finetuned=proxy_recipe(setting) if policy in fine else {},
        )
        made.append(point)
    return Front(tuple(made), base, measured_on(setting), _provenance(setting) | _volume(setting, made))


def _absolute(cost: str, value: float) -> float:
    """MACs, parameters and bytes are counts; of a cost's own unit nothing is known."""
    return round(value) if cost in COSTS else value


def measured_latencies(setting: Setting, points: Sequence[Evaluation]) -> dict[Policy, dict[str, float]]:
    """The points' latencies, measured anew as ratios to the dense model (a search predicts them); none unless asked."""
    table = setting.latency
    if table is None:
        return {}
    model = prepared_model(setting.task, setting.settings.torch_device)
    policies = [e.ask.policy for e in points]
    inputs, seed = setting.task.example_inputs(), setting.job.search.seed
    timings = remeasure(model, inputs, setting.structure, policies, table.runtime, table.batch_size, seed)
    return {policy: {"ratio": t.ratio, "iqr": t.iqr} for policy, t in timings.items()}


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
    same = [arm for arm in losses if arms[arm] == arms["search"]]
    if same:
        verdict = f"the search did NOT beat {' and '.join(same)}, whose policy it kept: {ours:.4g}"
    elif better:
        verdict = f"the search did NOT beat {rest}: it has {ours:.4g}"
    else:
        verdict = f"search {ours:.4g} against {rest}"
    return f"at {at:g}: {verdict} ({what}); {'before fine-tuning, ' if tuned else ''}the search's point: {gap}"


GAP: tuple[tuple[str, Split], ...] = (("fitness", "fitness"), ("held back", "heldback"), ("validation", "validation"))


def _row(plain: Evaluation | None, fine: Evaluation | None) -> dict[str, Any]:
    if plain is None:
        return {"macs_ratio": None, "costs": {}, "loss": None, "metrics": {}, "tuned_loss": None, "finetuned": None}
    tuned = {
        "tuned_loss": None if fine is None else fine.loss,
        "finetuned": None if fine is None else dict(fine.metrics),
    }
    costs = {"macs_ratio": plain.costs["macs"], "costs": dict(plain.costs)}
    return {**costs, "loss": plain.loss, "metrics": dict(plain.metrics), **tuned}


def told_loss(setting: Setting, e: Evaluation) -> dict[str, Any]:
    """What a policy file says of an evaluation's loss: its name, and the 95 % bootstrap interval where there is one."""
    found = loss_interval(e.sample_losses)
    interval = {} if found is None else dict(zip(("low", "high"), found, strict=True))
    return {"name": setting.settings.objective, "loss": e.loss, **interval}


def proxy_recipe(setting: Setting) -> dict[str, Any]:
    """The brief fine-tune of the search, so that `apply` can repeat it."""
    return {"recipe": "proxy", "steps": setting.settings.finetune_steps, "seed": setting.settings.seed}


def ranking(database: LevelDatabase, group: Group) -> tuple[int, ...]:
    """A group's atoms, the one kept longest first: kept sets of the widths on its grid are nested."""
    order: list[int] = []
    for width in group.grid:
        order += sorted(set(database.keep(group.name, width).tolist()) - set(order)) if width else []
    return tuple(order)


def _outdone(setting: Setting, fit: Sequence[Evaluation], chosen: Mapping[float, Policy]) -> set[Policy]:
    """Policies within a budget whose loss before fine-tuning is not above that of the budget's winner."""
    cost, losses = setting.problem.budget.cost, {e.ask.policy: e.loss for e in fit}
    limits = {at: losses[policy] for at, policy in chosen.items() if policy in losses}
    return {e.ask.policy for e in fit for at, loss in limits.items() if e.costs[cost] <= at + SLACK and e.loss <= loss}


def _feasible(constraints: Sequence[Constraint], plain: Evaluation, fine: Evaluation | None) -> bool:
    """Whether a point keeps the constraints, fine-tuned where it was tuned."""
    return kept(constraints, plain.metrics if fine is None else fine.metrics)


def _missed(constraints: Sequence[Constraint], seen: Sequence[Evaluation]) -> str:
    best = {c.metric: max(c.sign * e.metrics[c.metric] for e in seen if c.metric in e.metrics) for c in constraints}
    values = ", ".join(f"{c} (the best point has {c.sign * best[c.metric]:.4g})" for c in constraints)
    return f"no point of the front keeps the constraints on validation: {values}; lower them or allow more cost"


def _full(setting: Setting, told: Iterable[Evaluation]) -> list[Evaluation]:
    """Full evaluations at the fitness tier inside the budget range; those that keep the constraints where any do."""
    budget = setting.problem.budget
    within = [e for e in _whole(setting, told) if e.costs[budget.cost] <= budget.high + SLACK]
    return [e for e in within if kept(setting.constraints, e.metrics)] or within


def _whole(setting: Setting, told: Iterable[Evaluation]) -> list[Evaluation]:
    """Those on all fitness samples at the fitness tier that succeeded."""
    return [e for e in told if e.ok and e.ask == Ask(e.ask.policy, setting.tier)]


def _thinned(front: Sequence[Evaluation], setting: Setting) -> list[Evaluation]:
    """MAX_POINTS of the front, the best within each asked budget among them."""
    problem, log = setting.problem, setting.job.objectives.logarithmic
    by_loss = sorted(range(len(front)), key=lambda i: front[i].loss)
    within = ([i for i in by_loss if front[i].costs[problem.budget.cost] <= at + SLACK] for at in problem.budget.at)
    return thinned(front, MAX_POINTS, problem.objectives, log, {best for best, *_ in filter(None, within)})


def measured_on(setting: Setting) -> dict[str, Any]:
    """What policy.json says of where a run was measured."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    on_gpu = setting.settings.torch_device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    runtime = setting.latency.runtime if setting.latency is not None else "eager"
    return {"device": device, "threads": 1, "runtime": runtime, "versions": versions}


def _volume(setting: Setting, points: Sequence[Point]) -> dict[str, Any]:
    """The objectives and the hypervolume on validation, latencies as measured anew."""
    costs, log = setting.problem.objectives, setting.job.objectives.logarithmic
    ratios = [[p.ratio(c) for c in costs] for p in points]
    losses = (p.loss() for p in points)
    value = front_volume(zip(ratios, losses, strict=True), log)
    names = (*costs, "log loss" if log else "loss")
    reference = dict(zip(names, reference_point(len(costs)), strict=True))
    return {"objectives": list(costs), "hypervolume": {"value": value, "reference": reference}}


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
