"""A model-free world for the search side: a structure of twelve coupled groups and a picklable evaluator over it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from autoprune.costs.bytes import Bytes
from autoprune.costs.effective_macs import EffectiveMacs
from autoprune.costs.macs import Macs
from autoprune.costs.nonzeros import Nonzeros
from autoprune.costs.params import Params
from autoprune.evaluation import Ask, Evaluation
from autoprune.matrices import with_weights
from autoprune.pareto import hypervolume, pareto_front
from autoprune.policy import Policy
from autoprune.protocols import Budget, Cost, Problem, Sampler
from autoprune.space import Space, restrict
from autoprune.strategies.global_ import global_
from autoprune.strategies.uniform import uniform
from autoprune.structure import Group, Op, Slice, Stand, Structure, TensorSpec


def chain(n_groups: int = 12, seed: int = 0, grid_step: int = 1) -> Structure:
    """A chain of 3x3 convolutions with norms between; every third layer also reads a residual stream."""
    rng = np.random.default_rng(seed)
    widths = [int(w) for w in rng.choice([8, 12, 16, 24, 32], size=n_groups)]
    ops: list[Op] = []
    slices: list[list[Slice]] = [[] for _ in widths]
    previous, size = 3, 16
    for i, width in enumerate(widths):
        name = f"layer{i}"
        spec = TensorSpec(f"{name}.weight", (width, previous, 3, 3), 4)
        ops.append(Op(name, "Conv2d", i, size * size, spec.name, (3, 3), (1, 1), (size, size), (spec,)))
        norms = tuple(TensorSpec(f"{name}.norm.{t}", (width,), 4, t != "mean") for t in ("weight", "mean"))
        ops.append(Op(f"{name}.norm", "BatchNorm2d", i, tensors=norms))
        slices[i] += [Slice(spec.name, 0, "produce"), *(Slice(n.name, 0, "carry") for n in norms)]
        if i:
            slices[i - 1].append(Slice(spec.name, 1, "consume"))
        if i % 3 == 2:  # a 1x1 shortcut from the layer before the last: that group has two consumers
            extra, area = TensorSpec(f"{name}.short", (width, widths[i - 2], 1, 1), 4), size * size
            ops.append(Op(f"{name}.shortcut", "Conv2d", i, area, extra.name, (1, 1), (1, 1), (size, size), (extra,)))
            slices[i].append(Slice(extra.name, 0, "produce"))
            slices[i - 2].append(Slice(extra.name, 1, "consume"))
        previous, size = width, max(size // 2, 4) if i % 4 == 3 else size
    head = TensorSpec("head.weight", (10, previous), 4)
    ops.append(Op("head", "Linear", n_groups, 1, head.name, tensors=(head,)))
    slices[-1].append(Slice(head.name, 1, "consume"))
    ops.append(Op("attention", "matmul", n_groups, 500))
    grids = [tuple(w for w in range(1, width + 1) if w % grid_step == 0 or w == width) for width in widths]
    groups = [
        Group(f"layer{i}", "channel", w, tuple(s), g)
        for i, (w, s, g) in enumerate(zip(widths, slices, grids, strict=True))
    ]
    return Structure(tuple(groups), tuple(ops), {"head": "its outputs are the model's outputs"})


def with_blocks(plain: Structure) -> Structure:
    """The chain with two blocks: layers 1 and 2, inside of which lies the group of the first, and layer 3."""
    specs = [spec for op in plain.ops for spec in op.tensors]

    def block(name: str, layers: tuple[str, ...]) -> Group:
        held = [spec for spec in specs if spec.name.split(".")[0] in layers]
        slices = tuple(Slice(s.name, 0, "produce", 0, s.shape[0], s.shape[0]) for s in held)
        return Group(name, "block", 1, slices, (0, 1), (), tuple(Stand(layer, "zero") for layer in layers))

    blocks = block("block1", ("layer1", "layer2")), block("block3", ("layer3",))
    return Structure((*blocks, *plain.groups), plain.ops, plain.frozen)


def sparse(plain: Structure, pattern: str = "", alone: bool = False) -> Structure:
    """`plain` with groups of weights, or those `alone`."""
    return with_weights(Structure((), plain.ops, plain.frozen) if alone else plain, pattern)


SPARSE: Mapping[str, tuple[float, Callable[[], Structure]]] = {
    "alone": (0.1, lambda: sparse(chain(4, grid_step=2), alone=True)),
    "pattern": (0.5, lambda: restrict(chain(4, grid_step=2), Space(("channel", "2:4"), multiple_of=4))),
    "mixed": (0.1, lambda: sparse(chain(4, grid_step=2))),
    "blocks": (0.1, lambda: sparse(with_blocks(chain(4, grid_step=2)))),
}
"""Spaces with groups of weights, alone and beside other kinds: how few nonzeros they reach, and how they are made."""


@cache
def sparse_problem(space: str) -> Problem:
    """`make_problem` over one of SPARSE."""
    return make_problem(SPARSE[space][1]())


def attending() -> Structure:
    """The chain and an attention of four heads of eight; its products follow the heads."""
    plain, wide = chain(), 32
    specs = {name: TensorSpec(f"attn.{name}.weight", (wide, wide), 4) for name in ("q", "k", "v", "o")}
    made = [Slice(specs[name].name, 0, "produce", 0, 8, 8) for name in ("q", "k", "v")]
    group = Group("attn.q", "head", 4, (*made, Slice(specs["o"].name, 1, "consume", 0, 8, 8)), (1, 2, 3, 4))
    first = len(plain.ops)
    ops = [Op(s.name, "Linear", first + i, 16, s.name, tensors=(s,)) for i, s in enumerate(specs.values())]
    products = Op("attn (matmul)", "matmul", first + 4, 2 * 16 * 16 * wide, groups=("attn.q",))
    return Structure((*plain.groups, group), (*plain.ops, *ops, products), plain.frozen)


@dataclass(frozen=True)
class Hills:
    """A synthetic evaluator: groups differ in how much they mind being narrow; fewer samples mean more noise.

    `seconds` it takes; `fails` (of the policy's digest) raises; picklable, and a function of the ask alone.
    """

    structure: Structure
    seconds: float = 0.0
    fail_share: float = 0.0
    log: str | None = None  # a file that gets one line for each evaluation that really ran

    def __call__(self, ask: Ask) -> Evaluation:
        if self.log is not None:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(f"{ask.policy.digest} {ask.tier} {ask.fraction} {ask.split}\n")
        time.sleep(self.seconds)
        chance = int(ask.policy.digest[:8], 16) / 16**8
        if chance < self.fail_share:
            raise FloatingPointError(f"the loss of {ask.policy.digest} is not finite")
        noise = math.sin(1e4 * chance) * 0.05 / math.sqrt(ask.fraction)
        return Evaluation(
            ask,
            true_loss(self.structure, ask.policy) * math.exp(noise),
            {n: float(cost(ask.policy.array(self.structure))) for n, cost in counted(self.structure).items()},
            {"accuracy": 1.0 / (1.0 + true_loss(self.structure, ask.policy))},
            passes=ask.fraction,
            seconds=self.seconds,
        )


def counted(structure: Structure) -> dict[str, Cost]:
    """What is said of every evaluation, the cost of the budget first: where there are weights those that are left."""
    sparse_ones = any(g.kind == "weight" for g in structure)
    return {"nonzeros": Nonzeros(structure)} if sparse_ones else {"macs": Macs(structure)}


class Asks:
    """A ledger that counts asks, repeats too, and nothing else."""

    def __init__(self, n: int) -> None:
        self.left = n

    def may_ask(self, recorded: bool) -> bool:
        return self.left > 0

    def charge(self, ask: Ask) -> None:
        self.left -= 1

    def told(self, evaluation: Evaluation) -> None:
        pass


def true_loss(structure: Structure, policy: Policy) -> float:
    """Without noise: a sum over groups, the sensitivities spread over two decades."""
    dense = Policy.dense(structure).array(structure)
    sensitivity = 10 ** np.random.default_rng(1).uniform(-2, 0, size=len(structure))
    narrow = 1 - policy.array(structure) / dense
    return float(1e-3 + np.sum(sensitivity * narrow**2 * (1 + 2 * narrow)))


def drive(structure: Structure, sampler: Sampler, n: int, window: int = 16) -> list[Evaluation]:
    """Ask and tell `n` times with `window` asks in flight; the evaluations in order."""
    told: list[Evaluation] = []
    asks: list[Ask] = []
    while len(told) < n:
        while len(asks) < min(n, len(told) + window):
            asks.append(sampler.ask())
        told.append(Hills(structure)(asks[len(told)]))
        sampler.tell(told[-1])
    return told


def volume(structure: Structure, evaluations: list[Evaluation]) -> float:
    """Hypervolume of the noiseless log loss of full evaluations against the MACs ratio."""
    whole = [replace(e, loss=true_loss(structure, e.ask.policy)) for e in evaluations if e.ask.fraction == 1]
    front = np.array([[e.costs["macs"], np.log(e.loss)] for e in pareto_front(whole, ("macs",))])
    return hypervolume(front, np.array([0.91, 1.0]))


def make_problem(structure: Structure | None = None, n_trials: int = 60, seeded: bool = True) -> Problem:
    """A problem over `structure` whose scores know nothing of the sensitivities; seeds from both strategies."""
    structure = structure or chain()
    rng = np.random.default_rng(5)
    scores = {g.name: np.sort(rng.gamma(2.0, size=g.width))[::-1] for g in structure.groups}
    costs: dict[str, Cost] = {"macs": Macs(structure), "params": Params(structure), "bytes": Bytes(structure)}
    costs |= {"effective_macs": EffectiveMacs(structure), **counted(structure)}
    cost = next(iter(counted(structure)))
    budget = Budget(cost, 0.3, 0.9, (0.7, 0.5, 0.3), {})
    hills = Hills(structure)
    problem = Problem(structure, scores, costs, budget, (cost,), n_trials, table=sensitivity(structure, hills))
    if not seeded:
        return problem
    plans: list[Callable[[Problem, float], Policy]] = [uniform, global_]
    targets = np.linspace(budget.low, budget.high, 5)
    asks = dict.fromkeys(Ask(plan(problem, float(t)), "refit") for plan in plans for t in targets)
    return replace(problem, seeds=tuple(hills(ask) for ask in asks))


def sensitivity(structure: Structure, evaluate: Hills, n_widths: int = 5) -> dict[str, dict[int, float]]:
    """The loss with one group alone at `n_widths` of its widths below the dense one, and of the dense model."""
    dense = Policy.dense(structure).as_dict()
    table: dict[str, dict[int, float]] = {}
    for group in structure.groups:
        chosen = np.unique(np.round(np.linspace(0, len(group.grid) - 1, n_widths + 1)).astype(int))
        policies = {group.grid[i]: Policy.of({**dense, group.name: group.grid[i]}) for i in chosen}
        table[group.name] = {width: evaluate(Ask(policy, "refit")).loss for width, policy in policies.items()}
    return table


@dataclass(frozen=True)
class MakeHills:
    """The factory of `Hills` that executors call, here or in a worker."""

    structure: Structure
    seconds: float = 0.0
    fail_share: float = 0.0
    log: str | None = None

    def __call__(self) -> Hills:
        return Hills(self.structure, self.seconds, self.fail_share, self.log)


def single_steps(structure: Structure, policy: Policy) -> list[Policy]:
    """All policies that are one grid cell wider in one group."""
    widths = policy.as_dict()
    wider = {g.name: [w for w in g.grid if w > widths[g.name]] for g in structure.groups}
    return [Policy.of({**widths, name: above[0]}) for name, above in wider.items() if above]
