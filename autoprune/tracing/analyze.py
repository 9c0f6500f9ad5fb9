"""From a live model to a Structure: what can be pruned, what it costs, and what is frozen and why."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.structure import Group, Structure
from autoprune.tracing.atoms import Candidate, candidates, numbered
from autoprune.tracing.blocks import residual_blocks
from autoprune.tracing.certify import failures
from autoprune.tracing.claims import NOTHING, Claims, below
from autoprune.tracing.copies import private_copy, quiet_random_state
from autoprune.tracing.couple import closures
from autoprune.tracing.observe import Look, observe
from autoprune.tracing.ops import with_groups
from autoprune.tracing.reasons import (
    doubted,
    explain,
    known_reason,
    lost_reason,
    module_reasons,
    worth_another_look,
)
from autoprune.tracing.second_look import Settled, second_look
from autoprune.tracing.watch import Trace, is_producer

WORTH_SAYING_S = 2.0
STREAM = "its channels are those of a residual stream, which all layers share"


@dataclass(frozen=True, slots=True)
class Analysis:
    """A Structure and what it took: passes of the model in experiments, on which inputs; seconds of processor time."""

    structure: Structure
    passes: int
    inputs: tuple[Any, ...]
    seconds: float

    @property
    def said(self) -> str:
        """One line for a log; empty where it was a matter of moments."""
        if self.seconds < WORTH_SAYING_S:
            return ""
        sizes = ", ".join(" x ".join(map(str, x.shape)) for x in tree_leaves(self.inputs) if isinstance(x, Tensor))
        what = f"{len(self.structure)} groups proved in {self.passes} passes on inputs of {sizes}"
        return f"analysis: {what}, {self.seconds:.1f} s of processor time"


def analyze(model: nn.Module, example_inputs: Any, *, seed: int = 0, claims: Claims = NOTHING) -> Structure:
    """All groups of `model` that an experiment proved, in execution order and with full grids; the rest frozen.

    `example_inputs` is a tuple of the model's arguments, or a dict of them (keywords where `forward` has parameters of
    these names, else one argument). The lent model comes back untouched. A model of which nothing can be pruned gives
    a Structure without groups. `seed` is what a model that draws numbers in its forward draws them by; experiments
    have numbers of their own, so that the structure is the same for every seed. `claims` is what is known beforehand.

    Raises:
        InputError: the model cannot be copied, does not run on `example_inputs`, or cannot be traced.
    """
    return analyzed(model, example_inputs, seed=seed, claims=claims).structure


def analyzed(model: nn.Module, example_inputs: Any, *, seed: int = 0, claims: Claims = NOTHING) -> Analysis:
    """What `analyze` finds and what it took.

    Raises:
        InputError: as `analyze`.
    """
    begun = time.process_time()
    with quiet_random_state(seed):
        twin = private_copy(model)
        look = observe(twin, example_inputs)
        trace = look.trace
        modules = module_reasons(twin, trace)
        every = _found(twin, look, claims)
        found = [c for c in every if not any(map(claims.reason, c.producers))]
        frozen = {c.name: reason for c in found if (reason := known_reason(c, trace, modules))}
        blocks = [b for b in residual_blocks(twin, look.small, claims) if b.name not in {c.name for c in found}]
        open_ = [c for c in (*_declared((*claims.groups, *blocks)), *found) if c.name not in frozen]
        settled = Settled((), 0, look.small)
        if open_:
            doubtful = [c.name for c in open_ if c in found and doubted(c, trace)] + [b.name for b in blocks]
            proof = failures(twin, look, _groups(open_), True, doubtful)
            frozen |= {c.name: explain(c, trace, proof.failed[c.name]) for c in open_ if c.name in proof.failed}
            alive = tuple(c for c in open_ if c.name not in frozen)
            settled = Settled(alive, proof.passes, proof.example)
        if any(worth_another_look(frozen[c.name]) for c in found if c.name in frozen):
            settled = second_look(twin, look, settled, claims)
        stream = {p: known_reason(c, trace, modules) or STREAM for c in every if c not in found for p in c.producers}
        unproved = {c.producers[0]: frozen[c.name] for c in _declared(claims.groups) if c.name in frozen}
        beside = unproved | {p: claims.reason(p) or reason for p, reason in stream.items() if p not in unproved}
        said = _all_frozen(twin, trace, found, settled.alive, frozen, modules, claims, beside)
    groups = _renamed(sorted(settled.alive, key=lambda c: _rank(c, trace)))
    structure = Structure(groups, with_groups(look.ops, groups, look.products), said)
    return Analysis(structure, settled.passes, settled.example.inputs, time.process_time() - begun)


def _found(twin: nn.Module, look: Look, claims: Claims) -> tuple[Candidate, ...]:
    """Candidates by tracing, of what is not closed; nothing is traced where that is all."""
    makers = [name for name, module in twin.named_modules() if is_producer(module) and name in look.trace.order]
    if not look.trace.outputs or (claims.closed and claims.closes_all(makers)):
        return ()
    return candidates(twin, closures(twin, look.small.inputs), look.trace.order)


def _declared(groups: Sequence[Group]) -> tuple[Candidate, ...]:
    """Groups that were declared, and blocks, as candidates."""
    found = []
    for group in groups:
        makers = tuple(dict.fromkeys(s.tensor.rpartition(".")[0] for s in group.slices if s.role == "produce"))
        touched = tuple(dict.fromkeys(s.tensor.rpartition(".")[0] for s in group.slices))
        found.append(Candidate(group.name, group.width, makers, touched, makers, group))
    return tuple(found)


def _rank(candidate: Candidate, trace: Trace) -> tuple[int, int]:
    """By the first call of what makes the channels, then by where they lie in it."""
    made = [s for s in candidate.group.slices if s.role == "produce"] if candidate.group is not None else []
    return trace.order.get(candidate.producers[0], len(trace.order)), min((s.offset for s in made[:1]), default=0)


def _groups(some: Sequence[Candidate]) -> tuple[Group, ...]:
    return tuple(c.group for c in some if c.group is not None)


def _all_frozen(
    model: nn.Module,
    trace: Trace,
    found: Sequence[Candidate],
    alive: Sequence[Candidate],
    frozen: dict[str, str],
    modules: dict[str, str],
    claims: Claims,
    beside: dict[str, str],
) -> dict[str, str]:
    """Reasons of frozen groups, of the other producers that share their channels, and of modules outside all groups."""
    narrowed = [c for c in alive if c.group is not None and c.group.kind != "block"]
    slices = [s for g in _groups(narrowed) for s in g.slices if s.role != "consume"]
    pruned = {p for c in narrowed for p in c.producers} | {s.tensor.rpartition(".")[0] for s in slices}
    said = {p: reason for p, reason in beside.items() if p not in pruned}
    for candidate in found:  # the parts of one producer get along with one entry
        if candidate.name in frozen and candidate.producers[0] not in {*pruned, *said}:
            said[candidate.producers[0]] = frozen[candidate.name]
    for candidate in found:
        for producer in candidate.producers:
            if candidate.name in frozen and producer not in {*pruned, *said}:
                said[producer] = f"shares its channels with {candidate.name}: {frozen[candidate.name].split('; ')[0]}"
    for name, module in model.named_modules():
        if name not in {*said, *pruned} and (reason := _alone(name, module, trace, modules, claims)):
            said[name or "(model)"] = reason
    order = {name: i for i, name in enumerate(n or "(model)" for n, _ in model.named_modules())}
    named = {name or "(model)": reason for name, reason in said.items()}  # a bare layer has no name
    return dict(sorted(named.items(), key=lambda item: order[item[0]]))


def _alone(name: str, module: nn.Module, trace: Trace, modules: dict[str, str], claims: Claims) -> str:
    """Why a module outside of all candidates stays as it is; "" where that goes without saying."""
    if claims.reason(name):
        return claims.reason(name) if is_producer(module) else ""
    if name in modules:
        return modules[name]
    lost = is_producer(module) and not any(below(name, m) for m in modules)
    return lost_reason(name, module, trace) if lost else ""


def _renamed(alive: Sequence[Candidate]) -> tuple[Group, ...]:
    """Of several groups made by one module the first gets its plain name: that of a part that failed may be free.

    Blocks keep their own.
    """
    makers = [c for c in alive if c.group is not None and c.group.kind != "block"]
    names = dict(zip((c.name for c in makers), numbered([c.producers[0] for c in makers]), strict=True))
    return tuple(replace(c.group, name=names.get(c.name, c.name)) for c in alive if c.group is not None)
