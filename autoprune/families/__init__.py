"""Plug-in folder: one file a transformer family, which declares the groups that its modules hold.

A file holds a class named like it, without arguments. `parts(name, module)` gives what a module of that family is made
of, `Heads`, `Neurons` and `Branch`es, or nothing for a module that is not its own. Classes are told by name and
package, so that no file imports the library. What is declared is proved by experiment like every other group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from autoprune import plugins
from autoprune.families._layouts import Branch, Heads, Neurons, Part, Tied, branch_group, head_group, neuron_group
from autoprune.structure import Group, Structure
from autoprune.tracing.analyze import Analysis, analyzed
from autoprune.tracing.claims import NOTHING, Claims, below

STREAM = "it writes or reads the residual stream, which every layer of {} shares"
UNKNOWN = "no family for {}: see docs/extending.md"
DECLARED = "its outputs go into the residual stream, which all layers share"
LIBRARY = "transformers"


class Family(Protocol):
    """How one family of transformers is built.

    One that is `traced` decides nothing by its data, so that what it does not declare may be found by tracing.
    """

    traced: bool

    def parts(self, name: str, module: Any) -> Iterable[Part]:
        """What `module`, called `name` in its model, is made of; nothing where it is not of this family."""
        ...


def analyze(model: nn.Module, example_inputs: Any, *, seed: int = 0, kinds: Sequence[str] = ()) -> Structure:
    """All groups of `model` that a family declares or a trace finds, each proved by experiment; the rest frozen.

    See `tracing.analyze.analyze`. `kinds` are those that a search asks for: under grouped queries they decide whether
    key-value groups or query heads are the atoms.

    Raises:
        InputError: the model cannot be copied, does not run on `example_inputs`, or cannot be traced.
    """
    return analysed(model, example_inputs, seed=seed, kinds=kinds).structure


def analysed(model: nn.Module, example_inputs: Any, *, seed: int = 0, kinds: Sequence[str] = ()) -> Analysis:
    """What `analyze` finds and what it took."""
    return analyzed(model, example_inputs, seed=seed, claims=claimed(model, kinds))


def claimed(model: nn.Module, kinds: Sequence[str] = ()) -> Claims:
    """What the families of this folder know of `model`; nothing of what is no module, which the analysis refuses."""
    if not isinstance(model, nn.Module):
        return NOTHING
    families: list[Family] = [plugins.load("families", name)() for name in plugins.names("families")]
    groups: list[Group] = []
    known: dict[str, bool] = {}
    for name, module in model.named_modules():
        for family in families:
            found = list(family.parts(name, module))
            groups += _groups(model, found, kinds)
            known |= {part.at: family.traced for part in _flat(found)}
    return Claims(tuple(groups), dict.fromkeys(known, DECLARED) | _library(model, known))


def _groups(model: nn.Module, parts: Iterable[Part], kinds: Sequence[str]) -> Iterable[Group]:
    for part in parts:
        if isinstance(part, Branch):
            group = branch_group(model, part)
        elif isinstance(part, Neurons):
            group = neuron_group(model, part)
        else:
            group = head_group(model, part.heads if isinstance(part, Tied) else (part,), kinds)
        if group is not None:
            yield group


def _flat(parts: Iterable[Part]) -> Iterable[Heads | Neurons]:
    for part in parts:
        if not isinstance(part, Branch):
            yield from part.heads if isinstance(part, Tied) else (part,)


def _library(model: nn.Module, known: Mapping[str, bool]) -> dict[str, str]:
    """Models of transformers that attend are not traced: masks and caches decide by the data, graphs are huge."""
    closed: dict[str, str] = {}
    for name, module in model.named_modules():
        inside = [m for m in module.named_modules(prefix=name) if _is_attention(m[1])]
        unknown = [m for m in inside if not any(below(m[0], at) or below(at, m[0]) for at in known)]
        if _is_attention(module) and unknown:
            closed[name] = UNKNOWN.format(type(module).__name__)
        wary = unknown or any(below(at, name) for at, traced in known.items() if not traced)
        if inside and wary and _is_librarys(module) and not any(below(name, top) for top in closed):
            closed[name] = STREAM.format(type(module).__name__)
    return closed


def _is_librarys(module: nn.Module) -> bool:
    return any(kind.__module__.startswith(f"{LIBRARY}.models.") for kind in type(module).__mro__)


def _is_attention(module: nn.Module) -> bool:
    return _is_librarys(module) and "Attention" in type(module).__name__
