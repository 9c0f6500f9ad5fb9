"""A point of a front for a deeper or wider sibling of its model: carried over by stage and depth, projected anew."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from autoprune import plugins
from autoprune.allocation.sibling import Network, Wish, fitted, wishes
from autoprune.application.match import unlike
from autoprune.costs import build_cost
from autoprune.errors import InputError
from autoprune.families import analysed
from autoprune.front import COUNTS, Base, Point
from autoprune.matrices import PRECISIONS
from autoprune.policy import Policy
from autoprune.protocols import Cost
from autoprune.space import Space, restrict
from autoprune.structure import FINGERPRINT_VERSION, Group, Structure
from autoprune.tracing.inputs import described
from autoprune.tracing.slim import named_tensors

KEY = "transfer"
"""What policy.json (under space) and apply.json call what is known of a transfer."""
HINT = "--transfer carries it over to a sibling, approximately (autoprune.transfer in Python)"
"""What may be done with a policy of another structure."""
SEEN_BY = {"bits": ("bytes",), "weight": ("bytes", "nonzeros", "effective_macs")}
"""Kinds that leave every shape, and the costs that they are not free of."""
SAME = "--transfer: the model has the policy's own structure, so the point is applied as it is"
SAID = (
    "approximate: the widths were carried over from a policy of {model} by stage and relative depth (groups: {groups}) "
    "and projected to {cost} {reached:.4g} of dense, {wanted:.4g} in the policy; to have this model's own, search it: "
    "autoprune search JOB.yaml"
)


@dataclass(frozen=True)
class Sibling:
    """The model that points are carried over to, analysed once for all of them: every group of the policy's kinds.

    `front` is where a search of this model would have left its own.
    """

    name: str
    structure: Structure
    shapes: Mapping[str, tuple[int, ...]]
    inputs: tuple[Mapping[str, Any], ...]
    front: Path | None = None


def transfer(
    point: Point, model: nn.Module, example_inputs: Any, *, cost: str = "macs", deploy: str | None = None
) -> Point:
    """`point` for a deeper or wider sibling of its model, at the same ratio of `cost`: approximate, not searched.

    Stages are matched by name and relative depth, ratios between layers of the policy are interpolated, and widths are
    projected to the ratio on the grids that the policy's space gives there; `deploy` names a container that they must
    fit. The point that comes back goes into `apply` with this model, which ranks its atoms anew; losses in it are the
    old ones. A point whose structure the model has comes back as it is, with a warning.

    Raises:
        InputError: the model is no sibling, was pruned by this point, or cannot reach the ratio.
    """
    if not unlike(point, model):
        warnings.warn(SAME, stacklevel=2)
        return point
    return carried(point, sibling_of(point.base, model, example_inputs, type(model).__name__), cost, deploy)


def sibling_of(base: Base, model: nn.Module, example_inputs: Any, name: str, front: Path | None = None) -> Sibling:
    """Analyse `model` for the kinds of groups that `base` has.

    Raises:
        InputError: it cannot be analysed.
    """
    kinds = tuple(dict.fromkeys(g.kind for g in base.groups))
    found = analysed(model, example_inputs, kinds=kinds).structure
    shapes = {tensor: tuple(t.shape) for tensor, t in named_tensors(model).items()}
    return Sibling(name, found, shapes, described(example_inputs), front)


def carried(point: Point, sibling: Sibling, cost: str = "macs", deploy: str | None = None) -> Point:
    """`point` on the sibling's groups, its `cost` met to the cell; the kept atoms are to be ranked anew.

    Raises:
        InputError: nothing of the sibling corresponds to the policy's groups, or its ratio is out of reach there.
    """
    base = point.base
    names = [n for n in base.costs if n in plugins.names("costs")]
    cost = cost if cost in names else "macs"  # a user's own is not imported, a latency has no table here
    try:
        space = _space_of(base, sibling, deploy)
        wanted = wishes(Network(base.groups, base.shapes), point.policy, Network(space.groups, sibling.shapes))
        structure = _allowed(space, wanted)
        costs = {name: build_cost(name, structure) for name in names}
        ratios = np.array([wanted[g.name].ratio for g in structure])
        policy = fitted(structure, costs, ratios, {cost: point.ratio(cost)})
        policy = _as_wished(structure, policy, wanted, [kind for kind, seen in SEEN_BY.items() if cost not in seen])
    except InputError as error:
        raise InputError(f"--transfer of point {point.id} to {sibling.name}: {error}") from error
    reached = {name: float(c(policy.array(structure))) for name, c in costs.items()}
    told = _told(point, space, wanted, cost, reached[cost])
    return replace(
        point,
        policy=policy,
        keep={g.name: tuple(range(policy.as_dict()[g.name])) for g in structure if g.kind != "weight"},
        masks={},
        costs=_absolute(costs, reached),
        base=_base(base, sibling, structure, costs, told),
    )


def _as_wished(structure: Structure, policy: Policy, wanted: Mapping[str, Wish], kinds: Collection[str]) -> Policy:
    """`policy` with the bits or densities that are wished for: where they cost nothing, all would come back."""
    widths = policy.as_dict()
    for group in (g for g in structure if g.kind in kinds):
        widths[group.name] = min(group.grid, key=lambda w: abs(w - wanted[group.name].ratio * group.width))
    return Policy.from_array(structure, [widths[name] for name in structure.names])


def within(base: Base, sibling: Sibling, deploy: str | None) -> Sibling:
    """The sibling with all groups that policies beside a point that was carried over from `base` may name.

    Those of a container have names and operations of their own, so that there are no others beside them.
    """
    space = _space_of(base, sibling, deploy)
    if deploy is not None:
        return replace(sibling, structure=space)
    more = tuple(g for g in space if g.name not in sibling.structure.names)
    return replace(sibling, structure=replace(sibling.structure, groups=(*sibling.structure.groups, *more)))


def _space_of(base: Base, sibling: Sibling, deploy: str | None) -> Structure:
    """The sibling's groups with the steps of the policy's space, and what a container leaves of them."""
    own = {g.kind for g in base.groups}
    kinds = {str(g.kind) for g in sibling.structure if g.kind in own}
    kinds |= {g.pattern or g.kind for g in base.groups if g.matrices}
    if not kinds:
        return replace(sibling.structure, groups=())
    step = base.space.get("multiple_of", 1)
    bits = PRECISIONS if any(g.kind == "bits" for g in base.groups) else ()
    space = Space(granularity=tuple(sorted(kinds)), multiple_of=step, max_sparsity=1.0, bits=bits)
    found = restrict(sibling.structure, space)
    held: Structure = found if deploy is None else plugins.load("deploy", deploy)().restrict(found)
    return held


def _allowed(space: Structure, wanted: Mapping[str, Wish]) -> Structure:
    """The groups that have a wish, with the widths that the policy's space allows their kind and stage."""
    groups = tuple(_floored(g, wanted[g.name].least) for g in space if g.name in wanted)
    return Structure(groups, space.ops, space.frozen, space.fingerprint)


def _floored(group: Group, least: float) -> Group:
    return replace(group, grid=tuple(w for w in group.grid if w == group.width or w >= least * group.width - 1e-9))


def _absolute(costs: Mapping[str, Cost], ratios: Mapping[str, float]) -> dict[str, Any]:
    """Costs of a point as a policy file has them: counts, and the ratio of MACs."""
    found = {name: ratio * costs[name].dense for name, ratio in ratios.items()}
    whole = {name: round(value) if name in COUNTS else value for name, value in found.items()}
    return {**whole, "macs_ratio": ratios["macs"]}


def _base(
    base: Base, sibling: Sibling, structure: Structure, costs: Mapping[str, Cost], told: Mapping[str, Any]
) -> Base:
    """The sibling as a policy file identifies it; the weights are still those of the search, so nothing is replayed."""
    return replace(
        base,
        structure_fingerprint=structure.fingerprint,
        fingerprint_version=FINGERPRINT_VERSION,
        model=sibling.name,
        inputs=sibling.inputs,
        costs={name: cost.dense for name, cost in costs.items()},
        metrics={},
        groups=structure.groups,
        space={**base.space, KEY: dict(told)},
        shapes=sibling.shapes,
        order={},
        task={},
    )


def _told(point: Point, space: Structure, wanted: Mapping[str, Wish], cost: str, reached: float) -> dict[str, Any]:
    """What apply.json says of the transfer."""
    base, ways = point.base, Counter(wish.way for wish in wanted.values())
    groups = {way: ways.get(way, 0) for way in ("direct", "interpolated", "mean")}
    groups["left dense"] = len(space.groups) - len(wanted)
    words = ", ".join(f"{n} {way}" for way, n in groups.items() if n)
    said = SAID.format(model=base.model, groups=words, cost=cost, reached=reached, wanted=point.ratio(cost))
    origin = {"model": base.model, "structure": base.structure_fingerprint, "weights": base.weights_fingerprint}
    return {
        "approximate": True,
        "from": origin,
        "groups": groups,
        "cost": cost,
        "wanted": point.ratio(cost),
        "reached": reached,
        "said": said,
    }
