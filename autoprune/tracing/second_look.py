"""What the first look froze, looked at again: channels as the probe follows them, and parts that must shrink alike.

The probe may have two hypotheses: numbers of the model's modules that count channels go with them, or stay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from autoprune.structure import Group, Size
from autoprune.tracing.atoms import Candidate, candidates, numbered
from autoprune.tracing.certify import failures
from autoprune.tracing.claims import NOTHING, Claims
from autoprune.tracing.inputs import Example
from autoprune.tracing.observe import Look
from autoprune.tracing.probe import probed
from autoprune.tracing.reasons import attends, known_reason, module_reasons
from autoprune.tracing.slim import positions_of


@dataclass(frozen=True, slots=True)
class Settled:
    """Candidates whose groups are proved; passes of the model that it took, and on which inputs."""

    alive: tuple[Candidate, ...]
    passes: int
    example: Example


def second_look(twin: nn.Module, look: Look, first: Settled, claims: Claims = NOTHING) -> Settled:
    """`first` and what else is proved outside of what `claims` closes.

    `twin` is a private copy of the model and has other weights afterwards.
    """
    trace = look.trace
    try:
        ways = [candidates(twin, found, trace.order) for found in probed(twin, look.small.inputs)]
    except Exception:  # a forward may refuse the mode that looks at it, and the first look stands
        return first
    modules = module_reasons(twin, trace, firm=True)
    settled, past = first, set[Any]()
    for found in ways:
        open_ways = [c for c in found if not any(map(claims.reason, c.producers))]
        free = [c for c in _free(open_ways, settled.alive) if _what(c) not in past]
        special = _by_number(found)
        hopeful = [c for c in free if c.group is not None and special.isdisjoint(c.producers) and not attends(c, trace)]
        open_ = [c for c in hopeful if not known_reason(c, trace, modules)]
        settled = _tried(twin, look, settled, _named(settled.alive, open_)) if open_ else settled
        alike = _alike(_free(open_, settled.alive))
        settled = _tried(twin, look, settled, _named(settled.alive, alike)) if alike else settled
        past.update(map(_what, open_))
    return settled


def _what(candidate: Candidate) -> Any:
    """What an experiment tries, whatever it is called."""
    return candidate.group and (candidate.group.slices, candidate.group.sizes)


def _by_number(found: Sequence[Candidate]) -> set[str]:
    """Producers of which a forward uses a channel by its number (a mask, a confidence): their others stay as well.

    That the others may go would be true, but who uses one by its number soon uses more.
    """
    makers = [p for c in found for p in c.producers]
    return {p for c in found if c.width == 1 for p in c.producers if makers.count(p) > 1}


def _tried(twin: nn.Module, look: Look, known: Settled, new: Sequence[Candidate]) -> Settled:
    both = [c.group for c in (*known.alive, *new) if c.group is not None]
    proof = failures(twin, look, both, True, [c.name for c in new])
    alive = tuple(c for c in (*known.alive, *new) if c.name not in proof.failed)
    return Settled(alive, known.passes + proof.passes, proof.example)


def _free(found: Sequence[Candidate], alive: Sequence[Candidate]) -> list[Candidate]:
    """Those of `found` that no group in `alive` shares a position with."""
    taken: dict[tuple[str, int], set[int]] = defaultdict(set)
    for candidate in alive:
        for key, positions in _positions(candidate):
            taken[key].update(positions)
    return [c for c in found if not any(taken[key].intersection(positions) for key, positions in _positions(c))]


def _positions(candidate: Candidate) -> list[tuple[tuple[str, int], list[int]]]:
    if candidate.group is None or candidate.group.kind == "block":  # what lies inside of it is free
        return []
    atoms = torch.arange(candidate.group.width)
    return [((s.tensor, s.dim), positions_of(s, atoms).tolist()) for s in candidate.group.slices]


def _alike(open_: Sequence[Candidate]) -> list[Candidate]:
    """Parts of one layer that are as wide as each other, as one group: a forward may cut in equal shares."""
    parts: dict[tuple[str, int], list[Candidate]] = defaultdict(list)
    for candidate in open_:
        parts[candidate.producers[0], candidate.width].append(candidate)
    return [_together(some) for some in parts.values() if len(some) > 1]


def _together(parts: Sequence[Candidate]) -> Candidate:
    groups = [c.group for c in parts if c.group is not None]
    slices = dict.fromkeys(s for g in groups for s in g.slices)
    first = parts[0]
    return replace(
        first,
        producers=tuple(dict.fromkeys(p for c in parts for p in c.producers)),
        modules=tuple(dict.fromkeys(m for c in parts for m in c.modules)),
        group=replace(groups[0], name=first.name, slices=tuple(slices), sizes=_added(groups)),
    )


def _added(groups: Sequence[Group]) -> tuple[Size, ...]:
    """The numbers that parts count in, with what an atom of all parts together counts for."""
    each: dict[Size, int] = defaultdict(int)
    for size in (s for g in groups for s in g.sizes):
        each[replace(size, each=1)] += size.each
    return tuple(replace(size, each=n) for size, n in each.items())


def _named(known: Sequence[Candidate], new: Sequence[Candidate]) -> list[Candidate]:
    """`new` under names that are free."""
    names = numbered([*(c.name for c in known), *(c.name for c in new)])[len(known) :]
    return [
        replace(c, name=name, group=replace(c.group, name=name))
        for c, name in zip(new, names, strict=True)
        if c.group is not None
    ]
