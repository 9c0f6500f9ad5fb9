"""The exported front: its points with all that the final stages know of them, and what policy.json says beside them."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch

from autoprune.costs._latency_table import LatencyTable
from autoprune.database.store import LevelDatabase
from autoprune.errors import RunError
from autoprune.estimates import loss_interval
from autoprune.evaluation import Evaluation
from autoprune.evaluator.settings import Settings
from autoprune.files.job import Job
from autoprune.front import COUNTS, Base, Point
from autoprune.pareto import front_volume, reference_point
from autoprune.policy import Policy
from autoprune.protocols import Problem
from autoprune.structure import Group
from autoprune.version import __version__


@dataclass(frozen=True)
class Finding:
    """A policy of the front: scored on validation, fine-tuned where it was, its trial, its latency where asked for."""

    scored: Evaluation
    tuned: Evaluation | None
    trial: int
    latency: Mapping[str, float] | None

    @property
    def policy(self) -> Policy:
        return self.scored.ask.policy


def points_of(
    findings: Sequence[Finding], base: Base, database: LevelDatabase, settings: Settings
) -> tuple[Point, ...]:
    """The points of policy.json in their order, with validation and fine-tuned figures.

    Control arms appear where the search told them as seeds and no other point beats them.
    """
    made = []
    ranked = {g.name for g in base.groups if g.kind != "weight"}
    for i, found in enumerate(findings):
        tuned = {} if found.tuned is None else {"finetuned": found.tuned}
        told = {"validation": found.scored, **tuned}
        keep = {n: tuple(database.keep(n, w).tolist()) for n, w in found.policy.widths if n in ranked}
        ratios = found.scored.costs
        costs: dict[str, Any] = {c: _absolute(c, ratios[c] * dense_cost) for c, dense_cost in base.costs.items()}
        costs["macs_ratio"] = ratios["macs"]
        if found.latency is not None:
            costs["latency"] = dict(found.latency)
        point = Point(
            f"p{i:02d}",
            found.policy,
            keep,
            costs,
            losses={split: told_loss(e, settings.objective) for split, e in told.items()},
            metrics={split: dict(e.metrics) for split, e in told.items()},
            trial=found.trial,
            base=base,
            finetuned={} if found.tuned is None else proxy_recipe(settings, found.tuned.loss < found.scored.loss),
            masks=dict(found.scored.masks),
        )
        made.append(point)
    return tuple(made)


def _absolute(cost: str, value: float) -> float:
    """Counts are whole; of a cost's own unit nothing is known."""
    return round(value) if cost in COUNTS else value


def scored_base(base: Base, dense: Evaluation, database: LevelDatabase) -> Base:
    """The base with the dense model's own metrics on validation and every group's ranking.

    Raises:
        RunError: the dense model fails there.
    """
    if not dense.ok:
        raise RunError(f"the dense model fails on validation: {dense.error}")
    order = {g.name: ranking(database, g) for g in base.groups if g.kind != "weight"}
    return replace(base, metrics={"validation": dict(dense.metrics)}, order=order)


def told_loss(e: Evaluation, name: str) -> dict[str, Any]:
    """What a policy file says of an evaluation's loss: its name, and the 95 % bootstrap interval where there is one."""
    found = loss_interval(e.sample_losses)
    interval = {} if found is None else dict(zip(("low", "high"), found, strict=True))
    return {"name": name, "loss": e.loss, **interval}


def proxy_recipe(settings: Settings, helped: bool) -> dict[str, Any]:
    """The brief fine-tune of the search, so that `apply` can repeat it, and whether it made the point better."""
    found = {"recipe": "proxy", "steps": settings.finetune_steps, "seed": settings.seed, "helped": helped}
    return found if settings.learning_rate is None else {**found, "learning_rate": settings.learning_rate}


def ranking(database: LevelDatabase, group: Group) -> tuple[int, ...]:
    """A group's atoms, the one kept longest first: kept sets of the widths on its grid are nested."""
    order: list[int] = []
    for width in group.grid:
        order += sorted(set(database.keep(group.name, width).tolist()) - set(order)) if width else []
    return tuple(order)


def measured_on(
    settings: Settings, latency: LatencyTable | None, parts: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """What policy.json says of where a run was measured; of a latency the batch and the dense model's parts, too."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    on_gpu = settings.torch_device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    if latency is None:
        return {"device": device, "threads": 1, "runtime": "eager", "versions": versions}
    clocked = {"threads": latency.threads, "runtime": latency.runtime, "batch_size": latency.batch_size}
    return {
        "device": device,
        **clocked,
        "timed_on": latency.device,
        "versions": versions,
        **({} if parts is None else {"latency": dict(parts)}),
    }


def volume_facts(points: Sequence[Point], problem: Problem) -> dict[str, Any]:
    """The objectives and the hypervolume on validation, latencies as measured anew."""
    costs, log = problem.objectives, problem.logarithmic
    ratios = [[p.ratio(c) for c in costs] for p in points]
    losses = (p.loss() for p in points)
    value = front_volume(zip(ratios, losses, strict=True), log)
    names = (*costs, "log loss" if log else "loss")
    reference = dict(zip(names, reference_point(len(costs)), strict=True))
    return {"objectives": list(costs), "hypervolume": {"value": value, "reference": reference}}


def provenance(job: Job) -> dict[str, Any]:
    """Which job, at which version, made a front, and when."""
    part = job.search
    return {
        "autoprune": __version__,
        "job_sha256": job.sha256,
        "sampler": part.sampler,
        "trials": part.trials,
        "seed": part.seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
