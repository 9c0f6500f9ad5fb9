"""Which whole numbers of a model's modules count channels, by experiment: one is changed, and a cut is seen to move.

`x[:, : self.width]` does not shrink with x. A module's forward is run alone, on a copy (without values, if it can be),
with one of its numbers smaller by one. Where the first call that differs is one that cuts channels, the number counts
those up to the cut, and becomes a side of its own whose positions go together with them. A hypothesis as every tie: the
certificate decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoprune.tracing.copies import private_copy, quiet_random_state, shadow
from autoprune.tracing.inputs import call_model, on_device
from autoprune.tracing.labelled import Call, Labelled
from autoprune.tracing.labels import thinned
from autoprune.tracing.sizes import numbers_in, set_number

SPLITS = frozenset({"split", "unsafe_split"})
CUTS = frozenset({"slice", "split_with_sizes", "view", "_unsafe_view", "convolution", *SPLITS})
"""Operations whose whole numbers say where channels are cut, or how many there are."""

Cut = tuple[str, tuple[int, ...]]
"""An operation of CUTS by its name, and its numbers."""


@dataclass(frozen=True, slots=True)
class _Entered:
    """The first call of a module: its arguments, and how many cuts were seen before and inside."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    begun: int


def tie_sizes(model: nn.Module, inputs: Sequence[Any], known: Labelled, calls: Sequence[Call]) -> bool:
    """Tie the numbers of `model` to the channels that they count; whether there are any.

    `calls` are the cuts of the pass that gave the labels.
    """
    seen = [cut_of(c.name, c.named) for c in calls]
    for device in ("meta", "cpu"):  # some forwards need values; elsewhere a wrong index would cost the whole process
        with suppress(Exception):
            twin = shadow(model) if device == "meta" else private_copy(model)
            cuts, entered = _entries(twin, on_device(inputs, device))
            if cuts == seen:
                return any([_tie_module(name, entry, cuts, known, calls) for name, entry in entered.items()])
    return False


def cut_of(name: str, named: Mapping[str, Any]) -> Cut | None:
    """An operation that may cut channels, and its numbers, those that count from the end too; None for all others."""
    if name not in CUTS:
        return None
    if name == "slice":
        return name, (abs(named.get("start") or 0), abs(named.get("end") or 0))
    if name == "convolution":
        return name, (named["groups"],)
    sizes = named["size" if "view" in name else "split_sizes" if "with" in name else "split_size"]
    return name, (sizes,) if isinstance(sizes, int) else tuple(sizes)


class _Cuts(TorchDispatchMode):
    """Notes the cuts of a pass, each before it is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Cut] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call.of(func, args, kwargs or {}, None)
        if (cut := cut_of(call.name, call.named)) is not None:
            self.seen.append(cut)
        return func(*args, **(kwargs or {}))


def _entries(model: nn.Module, inputs: Any) -> tuple[list[Cut], dict[str, _Entered]]:
    """All cuts of one pass, and the first call of every module that holds numbers and has cuts inside."""
    entered: dict[str, _Entered] = {}
    cutting: set[str] = set()
    with quiet_random_state(0), torch.no_grad(), _Cuts() as log:
        handles = []
        for name, module in model.named_modules():
            if any(numbers_in(module)):
                enter, leave = _hooks(name, entered, cutting, log.seen)
                handles += [module.register_forward_pre_hook(enter, with_kwargs=True)]
                handles += [module.register_forward_hook(leave)]
        try:
            call_model(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
    return log.seen, {name: entry for name, entry in entered.items() if name in cutting}


def _hooks(
    name: str, entered: dict[str, _Entered], cutting: set[str], seen: list[Cut]
) -> tuple[Callable[..., None], Callable[..., None]]:
    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.setdefault(name, _Entered(module, args, kwargs, len(seen)))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if len(seen) > entered[name].begun:
            cutting.add(name)

    return enter, leave


def _tie_module(name: str, entry: _Entered, cuts: Sequence[Cut], known: Labelled, calls: Sequence[Call]) -> bool:
    found = False
    for attribute, index, value in list(numbers_in(entry.module)):
        moved = _moved(entry, attribute, index, value, 1, cuts)
        if moved is None:
            continue
        at, places = moved
        for i in places:
            count = cuts[at][1][i]
            each = 1 if _counts(calls[at], value, count) else value // count
            if each > 1 and (value % count or _moved(entry, attribute, index, value, each, cuts) != moved):
                continue
            path = f"{name}.{attribute}" if name else attribute
            found |= _tie(known, calls[at], i, known.places.labels((path, "size", index), value), each)
    return found


def _counts(call: Call, value: int, count: int) -> bool:
    """Whether a number is itself what a call is given, or a part of where it cuts."""
    return value == count or (call.name == "slice" and value < count)


def _moved(
    entry: _Entered, attribute: str, index: int | None, value: int, less: int, cuts: Sequence[Cut]
) -> tuple[int, tuple[int, ...]] | None:
    """The first cut that differs where a number is `less`, and which of its numbers are one less then."""
    held = getattr(entry.module, attribute)
    log = _Cuts()
    set_number(entry.module, attribute, index, value - less)
    try:
        with suppress(Exception), quiet_random_state(0), torch.no_grad(), log:  # what crashes has been seen until then
            entry.module(*entry.args, **entry.kwargs)
    finally:
        setattr(entry.module, attribute, held)
    for at, (name, numbers) in enumerate(log.seen, entry.begun):
        if at >= len(cuts) or cuts[at][0] != name or len(cuts[at][1]) != len(numbers):
            return None
        if cuts[at][1] != numbers:
            places = tuple(i for i, (a, b) in enumerate(zip(cuts[at][1], numbers, strict=True)) if b == a - 1)
            return at, places[:1] if name == "slice" else places  # where it begins moves where it ends
    return None


def _tie(known: Labelled, call: Call, i: int, side: Tensor, each: int) -> bool:
    """Tie the positions of a number to the channels that it counts in number `i` of a call."""
    x, dim, end = _place(call, i)
    labels = known.of(x)
    if labels is None:
        return False
    dim %= labels.dim()
    thin = thinned(labels, range(labels.dim()))
    if thin.shape[dim] < 2 or thin.numel() > thin.shape[dim]:  # no channels lie there, or others beside them
        return False
    vector, count = thin.reshape(-1), len(side) // each
    counted = vector[max(end - count, 0) : end]
    if len(counted) < count or not bool(counted.any()):
        return False
    known.places.tie(counted.repeat(each), side)
    if call.name in SPLITS and len(vector) % count == 0:
        known.places.tie(counted, vector.reshape(-1, count))
    return True


def _place(call: Call, i: int) -> tuple[Tensor, int, int]:
    """Tensor, dimension and the position behind the last one that number `i` of a call counts."""
    x: Tensor = call.named["input" if call.name == "convolution" else "self"]
    dim = call.named.get("dim", 0)
    if call.name == "convolution":
        return x, 1, call.named["groups"]
    if call.name == "slice":
        given = call.named.get(("start", "end")[i]) or 0
        return x, dim, x.shape[dim] if given < 0 else given
    if call.name in SPLITS:
        return x, dim, call.named["split_size"]
    if call.name == "split_with_sizes":
        return x, dim, sum(call.named["split_sizes"][: i + 1])
    return call.outputs[0], i, call.outputs[0].shape[i]
