"""What a transferred point is worth: its loss beside the uniform policy's, and that of a search of the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from autoprune.application.bench import Bench
from autoprune.application.repair import plain_tier, precision_of
from autoprune.application.transfer import KEY, Sibling
from autoprune.costs import build_cost
from autoprune.errors import InputError
from autoprune.evaluation import Ask
from autoprune.evaluator.prepared import prepared_model, prepared_parts
from autoprune.evaluator.settings import Settings
from autoprune.files.policy_file import load_front
from autoprune.front import Point
from autoprune.policy import Policy
from autoprune.protocols import Budget, Criterion, Problem, Task, finished
from autoprune.strategies.uniform import uniform
from autoprune.structure import FINGERPRINT_VERSION, Structure
from autoprune.tracing.copies import copied
from autoprune.tracing.fingerprint import weights_fingerprint


def losses_beside(
    point: Point,
    sibling: Sibling,
    model: nn.Module,
    task: Task,
    settings: Settings,
    criterion: Criterion,
) -> dict[str, Any]:
    """Losses on validation of policies at the point's cost, cut and repaired alike and none of them trained.

    {"name": "kl", "transfer": .., "uniform": ..}, and "search" where the sibling's front is of this very model and has
    a point within the cost.
    """
    told = point.base.space[KEY]
    policies = {"transfer": point.policy, "uniform": _uniform(point, sibling, told["cost"], told["wanted"])}
    if (found := _searched(sibling, model, told["cost"], told["wanted"])) is not None:
        policies["search"] = found
    structure = _structure_of(sibling.structure, policies)
    dense = prepared_model(task, settings.torch_device, copied(model))
    parts = prepared_parts(task, settings, dense)
    alike = replace(settings, precision=precision_of(point, settings), costs=())
    tier, losses = plain_tier(point), dict[str, float | None]()
    evaluator = finished(Bench(task, structure, alike, criterion, dense, parts, tier).evaluator(dense, structure, None))
    for name, policy in policies.items():
        evaluation = evaluator(Ask(_whole(structure, policy), tier, split="validation"))
        losses[name] = evaluation.loss if evaluation.ok else None
    return {"name": point.losses.get("validation", {}).get("name", settings.objective), **losses}


def _uniform(point: Point, sibling: Sibling, cost: str, wanted: float) -> Policy:
    """The same share of every group that was carried over, at the same cost."""
    structure = Structure(point.base.groups, sibling.structure.ops)
    costs = {cost: build_cost(cost, structure)}
    return uniform(Problem(structure, {}, costs, Budget(cost, wanted, 1.0, (wanted,), {})), wanted)


def _searched(sibling: Sibling, model: nn.Module, cost: str, wanted: float) -> Policy | None:
    """The best policy within the cost of a front of this very model; None where there is none."""
    if sibling.front is None or not sibling.front.is_file():
        return None
    with suppress(InputError):  # a file that nobody named is no mistake of the user's
        front = load_front(sibling.front)
        base, known = front.base, {g.name: g.width for g in sibling.structure}
        same = base.structure_fingerprint == sibling.structure.fingerprint
        there = base.fingerprint_version == FINGERPRINT_VERSION and all(
            known.get(g.name) == g.width for g in base.groups
        )
        if same and there and base.weights_fingerprint == weights_fingerprint(model):
            return front.select(f"{cost}={wanted!r}").policy
    return None


def _structure_of(whole: Structure, policies: Mapping[str, Policy]) -> Structure:
    """All groups that one of the policies names, with its widths and the dense one."""
    widths = [policy.as_dict() for policy in policies.values()]
    assert {name for some in widths for name in some} <= set(whole.names)
    named = [g for g in whole if any(g.name in some for some in widths)]
    grids = {g.name: sorted({g.width, *(some[g.name] for some in widths if g.name in some)}) for g in named}
    groups = tuple(replace(g, grid=tuple(grids[g.name])) for g in named)
    return Structure(groups, whole.ops, whole.frozen, whole.fingerprint)


def _whole(structure: Structure, policy: Policy) -> Policy:
    """The policy with the groups that it does not name at their dense widths."""
    widths = policy.as_dict()
    return Policy.from_array(structure, [widths.get(g.name, g.width) for g in structure])
