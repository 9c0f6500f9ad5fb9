"""Which whole numbers of a model's modules count channels, by experiment: one is changed, and a cut is seen to move.

`x[:, : self.width]` does not shrink with x. A module's forward is run alone, on a copy (without values, if it can be),
with one of its numbers smaller by one. Where the first call that differs is one that cuts channels, the number counts
those up to the cut, and becomes a side of its own whose positions go together with them. A hypothesis as every tie: the
certificate decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class Marked:
    """A call that cuts, and the labels of the tensor in which its numbers count: of a view, else of what it cuts."""

    call: Call
    labels: Tensor | None

    @staticmethod
    def of(call: Call, known: Labelled) -> Marked | None:
        """None for a call that cuts nothing."""
        if call.name not in CUTS:
            return None
        x = call.outputs[0] if "view" in call.name else call.named["input" if call.name == "convolution" else "self"]
        return Marked(call, known.of(x))

    def place(self, i: int, labels: Tensor) -> tuple[int, int]:
        """Dimension, and the position behind the last one that number `i` of the call counts."""
        named, name = self.call.named, self.call.name
        if name == "convolution":
            return 1, named["groups"]
        if "view" in name:
            return i, labels.shape[i]
        dim = named.get("dim", 0) % labels.dim()
        if name == "slice":
            given = named.get(("start", "end")[i]) or 0
            return dim, labels.shape[dim] if given < 0 else given
        return dim, named["split_size"] if name in SPLITS else sum(named["split_sizes"][: i + 1])


@dataclass(frozen=True, slots=True)
class Counted:
    """A number that counts: where it is held, its value, what a channel counts for, and in which number of a call."""

    attribute: str
    index: int | None
    value: int
    each: int
    where: Marked
    place: int


def counted(model: nn.Module, inputs: Sequence[Any], marks: Sequence[Marked]) -> list[Counted]:
    """The numbers of `model` that say where the calls `marks`, all that cut in one pass, cut."""
    seen = [cut_of(m.call.name, m.call.named) for m in marks]
    for device in ("meta", "cpu"):  # some forwards need values; elsewhere a wrong index would cost the whole process
        with suppress(Exception):
            twin = shadow(model) if device == "meta" else private_copy(model)
            cuts, entered = _entries(twin, on_device(inputs, device))
            if cuts == seen:
                return [found for name, entry in entered.items() for found in _in_module(name, entry, cuts, marks)]
    return []


def tie_counted(known: Labelled, found: Sequence[Counted], merge: bool = False) -> bool:
    """Tie numbers to the channels that they count; whether any was.

    With `merge` it is the turn of those that count rows of channels (`x.view(-1, self.channels, 4, 4)`), each of which
    then goes together.
    """
    return any([_tie(known, one, merge) for one in found])


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


def _in_module(name: str, entry: _Entered, cuts: Sequence[Cut], marks: Sequence[Marked]) -> Iterator[Counted]:
    for attribute, index, value in list(numbers_in(entry.module)):
        moved = _moved(entry, attribute, index, value, 1, cuts)
        at, places = moved or (0, ())
        for i in places:
            count = cuts[at][1][i]
            each = 1 if _counts(marks[at].call, value, count) else value // count
            if each == 1 or (value % count == 0 and _moved(entry, attribute, index, value, each, cuts) == moved):
                yield Counted(f"{name}.{attribute}" if name else attribute, index, value, each, marks[at], i)


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


def _tie(known: Labelled, one: Counted, merge: bool) -> bool:
    """Tie the positions of a number to the channels that it counts."""
    labels = one.where.labels
    if labels is None:
        return False
    dim, end = one.where.place(one.place, labels)
    thin = thinned(labels, range(labels.dim()))
    if thin.shape[dim] < 2 or merge != (thin.numel() > thin.shape[dim]):  # no channels lie there, or others beside them
        return False
    vector, count = thin.movedim(dim, 0).reshape(thin.shape[dim], -1), one.value // one.each
    chosen = vector[max(end - count, 0) : end, 0]
    if len(chosen) < count or not bool(chosen.any()):
        return False
    known.places.merge(vector, [1])
    known.places.tie(chosen.repeat(one.each), known.places.labels((one.attribute, "size", one.index), one.value))
    if one.where.call.name in SPLITS and len(vector) % count == 0:
        known.places.tie(chosen, vector[:, 0].reshape(-1, count))
    return True
