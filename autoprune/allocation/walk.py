"""The AMC walk (He et al. 2018): one action a group in structure order, and the policy that the actions amount to.

Nothing is evaluated on the way: what an agent sees depends on the groups, the target and its own earlier actions alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from autoprune.allocation.budget import Projector
from autoprune.allocation.knapsack import Allocator, penalties
from autoprune.errors import InputError, did_you_mean
from autoprune.matrices import WEIGHT
from autoprune.policy import IntArray, Policy
from autoprune.protocols import FloatArray, Problem
from autoprune.structure import Op, Structure

State = npt.NDArray[np.float32]

REACH = 0.5  # an action of 1 asks for a width that is wider than the prior's by this share of the dense width
CURVE = (0.25, 0.5, 0.75)  # widths, relative to dense, at which an agent sees the sensitivity of a group
DECADES = 4.0  # penalties below the largest one by more than this look like none at all


class Feature(NamedTuple):
    """One entry of the state: its name, its range, and what it says."""

    name: str
    low: float
    high: float
    meaning: str


CLASSIC_FEATURES = (
    Feature("index", 0.0, 1.0, "t: place of the group in the walk"),
    Feature("width", 0.0, 1.0, "n: atoms in the dense model, log, over the largest"),
    Feature("inputs", 0.0, 1.0, "c: inputs of one atom's layer, log, over the largest"),
    Feature("height", 0.0, 1.0, "h: of the layer's output, over the largest"),
    Feature("breadth", 0.0, 1.0, "w: of the layer's output, over the largest"),
    Feature("stride", 0.0, 1.0, "stride of the layer, over the largest"),
    Feature("kernel", 0.0, 1.0, "k: of the layer, over the largest"),
    Feature("cost", 0.0, 1.0, "FLOPs[t]: share of the dense cost that the group decides, over the largest"),
    Feature("reduced", 0.0, 1.0, "share of the dense cost that the groups walked so far have saved"),
    Feature("rest", 0.0, 1.0, "share of the dense cost that the groups from here on can save at most"),
    Feature("previous", -1.0, 1.0, "a[t-1]: the action before, 0 at the first group"),
)
"""The state of the paper, each entry normalised."""

RESIDUAL_FEATURES = (
    *CLASSIC_FEATURES,
    *(Feature(f"penalty_{w:g}", 0.0, 1.0, f"loss of the group alone at {w:g} of its width, log scale") for w in CURVE),
    Feature("target", 0.0, 1.0, "the budget of this walk, a ratio to dense"),
    Feature("prior", 0.0, 1.0, "width that the knapsack gives the group at this budget, over dense"),
)
"""The state of the paper, the group's sensitivity curve, the budget, and the prior that actions move away from."""


@dataclass
class Episode:
    """A walk under way. `positions` hold what was chosen so far and full width from there on; `wish` is in ratios."""

    target: float
    prior: IntArray
    positions: IntArray
    wish: FloatArray
    actions: list[float] = field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.actions)


class Walk(Protocol):
    """What differs between the profiles: the state, what an action in [-1, 1] means, and the reward."""

    @property
    def features(self) -> tuple[Feature, ...]:
        """The entries of the state."""

    @property
    def n_steps(self) -> int:
        """Actions in one walk, one for each group."""

    def start(self, target: float) -> Episode:
        """A new walk to a policy whose budget cost is at most `target`; InputError where no policy gets there."""

    def observe(self, episode: Episode) -> State:
        """The state before the next action, float32 [features]; zeros after the last one."""

    def act(self, episode: Episode, action: float) -> None:
        """Take the action of the next group."""

    def policy(self, episode: Episode) -> Policy:
        """The policy of a walk that is at its end, within all limits."""

    def prior(self, target: float) -> Policy | None:
        """The policy that rewards are relative to; None where they are absolute."""

    def reward(self, loss: float, reference: float | None) -> float:
        """Of a policy of that loss; `reference` is the loss of the prior at the same target."""


class Classic:
    """The walk of the paper: an action is a keep ratio, (action + 1) / 2, clipped by Algorithm 1; reward -loss.

    Of the allowed widths the clip leaves those with which the groups still to come can reach the budget.
    """

    features = CLASSIC_FEATURES

    def __init__(self, problem: Problem) -> None:
        self._layers = _Layers(problem)
        self.n_steps = len(problem.structure)

    def start(self, target: float) -> Episode:
        layers, last = self._layers, self._layers.codec.last
        layers.projector.check(layers.limits(target))
        return Episode(target, last, last.copy(), np.ones(len(last)))

    def observe(self, episode: Episode) -> State:
        return self._layers.state(episode)

    def act(self, episode: Episode, action: float) -> None:
        layers, t = self._layers, episode.step
        ratio = (_checked(action) + 1) / 2
        options = np.repeat(episode.positions[None], layers.codec.last[t] + 1, axis=0)
        options[:, t], options[:, t + 1 :] = np.arange(len(options)), 0
        fitting = np.flatnonzero(layers.projector.fits(options, layers.limits(episode.target)))
        wished = np.where(np.arange(self.n_steps) == t, ratio, 1.0)
        position = min(int(layers.codec.floor(wished)[t]), int(fitting[-1]) if len(fitting) else 0)
        episode.positions[t], episode.wish[t] = position, ratio
        episode.actions.append(float(action))

    def policy(self, episode: Episode) -> Policy:
        layers, limits = self._layers, self._layers.limits(episode.target)
        if layers.projector.fits(episode.positions[None], limits)[0]:
            return layers.codec.policy(episode.positions)
        # only where a cost is not monotone: narrower later groups need not have made room
        return layers.projector.project(layers.codec.ratios(layers.codec.widths(episode.positions)), limits)

    def prior(self, target: float) -> Policy | None:
        return None

    def reward(self, loss: float, reference: float | None) -> float:
        return -loss


class Residual:
    """Our walk: an action moves a group away from its width in the knapsack's solution; the end is projected exactly.

    The reward is the log of the knapsack's loss at the same budget less the log of this loss (plain losses where one
    is not positive): 0 for all actions 0, positive where the agent knows better than the sensitivity table.
    """

    features = RESIDUAL_FEATURES

    def __init__(self, problem: Problem) -> None:
        self._layers = _Layers(problem)
        self._penalties = penalties(problem, "the AMC walk of profile 'residual'")
        self._curves = _curves(problem.structure, self._penalties)
        self._allocator = Allocator(problem.structure, problem.costs)
        self._priors: dict[float, IntArray] = {}
        self.n_steps = len(problem.structure)

    def start(self, target: float) -> Episode:
        prior, codec = self._prior(target), self._layers.codec
        return Episode(target, prior, codec.last.copy(), codec.ratios(codec.widths(prior)))

    def observe(self, episode: Episode) -> State:
        t, codec = episode.step, self._layers.codec
        state = self._layers.state(episode)
        if t == self.n_steps:
            return np.zeros(len(self.features), dtype=np.float32)
        ratio = codec.widths(episode.prior)[t] / codec.dense[t]
        own = np.array([*self._curves[t], min(episode.target, 1.0), ratio], dtype=np.float32)
        return np.concatenate([state, own])

    def act(self, episode: Episode, action: float) -> None:
        t, codec = episode.step, self._layers.codec
        episode.wish[t] = np.clip(episode.wish[t] + REACH * _checked(action), 0.0, 1.0)
        episode.positions[t] = codec.floor(episode.wish)[t]
        episode.actions.append(float(action))

    def policy(self, episode: Episode) -> Policy:
        return self._layers.projector.project(episode.wish, self._layers.limits(episode.target))

    def prior(self, target: float) -> Policy | None:
        return self._layers.codec.policy(self._prior(target))

    def reward(self, loss: float, reference: float | None) -> float:
        if reference is None:
            return 0.0
        if min(loss, reference) > 0:
            return math.log(reference / loss)
        return reference - loss

    def _prior(self, target: float) -> IntArray:
        if target not in self._priors:
            self._priors[target] = self._allocator.solve(self._penalties, self._layers.limits(target))
        return self._priors[target]


PROFILES: Mapping[str, type[Classic] | type[Residual]] = {"residual": Residual, "classic": Classic}


def build_walk(problem: Problem, profile: str, where: str = "profile") -> Walk:
    """The walk of that profile over `problem`; "amc-classic" is the same as "classic".

    Raises:
        InputError: no such profile, a budget out of reach, or no sensitivity table where the profile needs one.
    """
    name = profile.removeprefix("amc-") if isinstance(profile, str) else profile
    if name not in PROFILES:
        raise InputError(f"{where}: unknown profile {profile!r}; {did_you_mean(str(profile), PROFILES)}")
    return PROFILES[name](problem)


class _Layers:
    """What all profiles see of the groups and of the way behind."""

    def __init__(self, problem: Problem) -> None:
        budget = problem.budget
        self.projector = Projector(problem.structure, problem.costs)
        self.projector.check({**budget.limits, budget.cost: budget.low})
        self.codec = self.projector.codec
        self._cost = problem.costs[budget.cost]
        self._budget = budget
        self._static = np.column_stack([_layer_features(problem.structure), self._shares()])

    def limits(self, target: float) -> dict[str, float]:
        return {**self._budget.limits, self._budget.cost: target}

    def state(self, episode: Episode) -> State:
        """The entries of CLASSIC_FEATURES; zeros after the last step."""
        t = episode.step
        if t == len(self.codec.last):
            return np.zeros(len(CLASSIC_FEATURES), dtype=np.float32)
        narrowest = np.where(np.arange(len(self.codec.last)) < t, episode.positions, 0)
        now, least = self._cost(self.codec.widths(np.stack([episode.positions, narrowest])))
        previous = episode.actions[-1] if t else 0.0
        way = np.clip([1.0 - now, now - least], 0.0, 1.0)
        return np.concatenate([self._static[t], way, [previous]]).astype(np.float32)

    def _shares(self) -> FloatArray:
        """For each group the share of the dense cost that goes when it alone is narrowest, over the largest."""
        last = self.codec.last
        shares = 1.0 - self._cost(self.codec.widths(last * (1 - np.eye(len(last), dtype=np.int64))))
        return _over_largest(np.maximum(shares, 0.0))


def _layer_features(structure: Structure) -> FloatArray:
    """[groups, 7]: index, width, inputs, height, breadth, stride, kernel, each in [0, 1]."""
    shapes = {spec.name: spec.shape for op in structure.ops for spec in op.tensors}
    owners = {op.weight: op for op in structure.ops if op.weight is not None}
    rows = []
    for index, group in enumerate(structure.groups):
        own = [s.tensor for s in group.slices if s.role == "produce"] + list(group.matrices) * (group.kind == WEIGHT)
        made = [owners[name] for name in own if name in owners]
        op = max(made, key=lambda o: o.positions * math.prod(shapes.get(o.weight or "", (1,))), default=None)
        atoms = group.width if op is None or group.kind != WEIGHT else shapes[op.weight or ""][op.outputs]
        rows.append([index, math.log1p(group.width), *_geometry(op, shapes, atoms)])
    return np.column_stack([_over_largest(column) for column in np.array(rows, dtype=np.float64).T])


def _geometry(op: Op | None, shapes: Mapping[str, tuple[int, ...]], width: int) -> list[float]:
    """[log inputs, height, breadth, stride, kernel] of the layer that produces a group, or has its weights."""
    if op is None:
        return [0.0, 1.0, 1.0, 1.0, 1.0]
    inputs = math.prod(shapes.get(op.weight or "", (1,))) / max(1, width * math.prod(op.kernel))
    height, breadth = (op.spatial[0], op.spatial[-1]) if op.spatial else (1, 1)
    return [math.log1p(inputs), height, breadth, max(op.stride, default=1), max(op.kernel, default=1)]


def _curves(structure: Structure, losses: tuple[FloatArray, ...]) -> FloatArray:
    """[groups, CURVE]: penalties on a log scale, 1 the largest of all groups, 0 what is DECADES below."""
    rows = []
    for group, penalty in zip(structure.groups, losses, strict=True):
        rows.append(np.interp(CURVE, np.array(group.grid) / max(group.width, 1), penalty))
    values = np.maximum(np.array(rows), 0.0)
    largest = float(values.max(initial=0.0))
    if largest <= 0:
        return np.zeros_like(values)
    decades = np.log10(np.maximum(values / largest, 10**-DECADES))
    return np.asarray(1 + decades / DECADES)


def _over_largest(values: FloatArray) -> FloatArray:
    largest = float(np.max(values, initial=0.0))
    return values / largest if largest > 0 else np.zeros_like(values)


def _checked(action: float) -> float:
    if not -1.0 <= action <= 1.0:
        raise InputError(f"an action must lie in [-1, 1], not {action}")
    return action
