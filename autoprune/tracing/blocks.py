"""Blocks as groups: a residual branch that may go as a whole, declared by a family or seen in one forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from autoprune.structure import Group, Role, Slice, Stand
from autoprune.tracing.calls import ADDS
from autoprune.tracing.claims import Claims, below
from autoprune.tracing.copies import quiet_random_state
from autoprune.tracing.inputs import Example, call_model
from autoprune.tracing.slim import named_tensors


def block_group(model: nn.Module, name: str, stands: Sequence[Stand], silent: Sequence[str] = ()) -> Group | None:
    """The block called `name` whose modules are replaced by `stands`; None where others hold some of their tensors.

    Its branch is zero where the tensors of those that then give zeros are zero, or those of the modules `silent`.
    """
    places = [s.module for s in stands]
    named, owners = {id(t): n for n, t in named_tensors(model).items()}, _owners(model)
    closing = tuple(silent) or tuple(s.module for s in stands if s.gives == "zero")
    slices: dict[str, Slice] = {}
    for place in places:
        for path, value in _tensors(model.get_submodule(place), place):
            if any(not any(below(owner, p) for p in places) for owner in owners[id(value)]):
                return None  # tied to what stays, or a module under a second name
            if value.dim():
                ends = any(path.rpartition(".")[0] == last for last in closing)
                role: Role = "consume" if ends else "produce"
                tensor = named[id(value)]
                slices[tensor] = Slice(tensor, 0, role, 0, value.shape[0], value.shape[0])
    ordered = sorted(slices.values(), key=lambda s: s.role == "consume")
    return Group(name, "block", 1, tuple(ordered), (0, 1), (), tuple(stands)) if ordered else None


def _owners(model: nn.Module) -> dict[int, set[str]]:
    """Of each tensor, by id, all paths of modules that hold it themselves."""
    found: dict[int, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for _, tensor in _tensors(module, path, recurse=False):
            found.setdefault(id(tensor), set()).add(path)
    return found


def residual_blocks(model: nn.Module, example: Example, claims: Claims) -> tuple[Group, ...]:
    """Blocks of convolutional networks and their like: what a module adds to its own input, where both are as large.

    Seen in one forward pass of `model`; not inside of what `claims` closes or has blocks in. Whether a branch may
    really go is left to the experiment.
    """
    watch = _Watch()
    try:
        watch.begin(model)
        with quiet_random_state(0), torch.no_grad(), watch:
            call_model(model, example.inputs)
    except Exception:  # TorchScript and some forwards refuse to be watched; then there are no blocks
        return ()
    finally:
        watch.end()
    known = [s.module for g in claims.groups for s in g.stands]
    found = []
    for name, inside in watch.branches.items():
        stands = _stands(inside, watch)
        apart = not any(below(k, name) or below(name, k) for k in known) and not claims.reason(name)
        if stands and apart:
            found.append(block_group(model, name, stands))
    return tuple(g for g in found if g is not None)


def _stands(inside: Sequence[str], watch: _Watch) -> tuple[Stand, ...]:
    """All but the last of these modules pass their input on, which then gives zeros."""
    outer = [n for n in inside if not any(o != n and below(n, o) for o in inside)]
    if not outer or any(watch.calls[n] != 1 or n in watch.odd for n in outer):
        return ()
    return (*(Stand(n, "input") for n in outer[:-1]), Stand(outer[-1], "zero"))


@dataclass
class _Entry:
    """A module that is running: its input, and the modules with tensors that ran in it."""

    name: str
    x: Tensor | None
    inside: list[str] = field(default_factory=list)


class _Watch(TorchFunctionMode):
    """Notes, by module, what ran in it before it added something to its own input.

    `odd` are modules that take or return more than one tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.branches: dict[str, tuple[str, ...]] = {}
        self.calls: Counter[str] = Counter()
        self.odd: set[str] = set()
        self._running: list[_Entry] = []
        self._alive: list[Any] = []
        self._hooks: list[RemovableHandle] = []

    def begin(self, model: nn.Module) -> None:
        """Watch all modules inside of `model`."""
        for name, module in model.named_modules():
            if name:
                self._hooks.append(module.register_forward_pre_hook(self._entering(name, module)))
                self._hooks.append(module.register_forward_hook(self._leaving(name)))

    def end(self) -> None:
        """Take the hooks off again."""
        for hook in self._hooks:
            hook.remove()

    def _entering(self, name: str, module: nn.Module) -> Any:
        owns = any(True for _ in _tensors(module, name, recurse=False))

        def hook(_: nn.Module, args: Any) -> None:
            tensors = [a for a in args if isinstance(a, Tensor)]
            self.calls[name] += 1
            if len(args) != 1 or len(tensors) != 1:
                self.odd.add(name)
            if owns:
                for entry in self._running:
                    entry.inside.append(name)
            self._alive.extend(tensors)  # or another tensor might get its number
            self._running.append(_Entry(name, tensors[0] if len(args) == 1 and tensors else None))

        return hook

    def _leaving(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any, out: Any) -> None:
            if not isinstance(out, Tensor):
                self.odd.add(name)
            while self._running and self._running.pop().name != name:
                pass

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ADDS and len(args) == 2 and not kwargs and all(isinstance(a, Tensor) for a in args):
            a, b = args
            for entry in reversed(self._running):
                if (a is entry.x) != (b is entry.x) and a.shape == b.shape and entry.inside:
                    self.branches.setdefault(entry.name, tuple(entry.inside))
                    break
        return func(*args, **(kwargs or {}))


def _tensors(module: nn.Module, path: str, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    held: Mapping[str, Tensor] = {
        **dict(module.named_parameters(path, recurse)),
        **dict(module.named_buffers(path, recurse)),
    }
    yield from held.items()
