"""One forward pass under observation: who ran, where weights were used, who feeds whom, what looks hard to prune."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from autoprune.errors import InputError, one_line
from autoprune.tracing.calls import CONVS, LINEAR, TRANSPOSED, parse_call
from autoprune.tracing.inputs import call_model
from autoprune.tracing.suspects import DECISIONS, LIKE, Seen, along_channels, lie_last, suspicion

Node = Any
"""A node of the autograd graph."""

BAKE = "a layer that holds the computed weight is narrowed"
"""What to do about a weight that is computed anew in every forward."""

OPAQUE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, torch.jit.ScriptModule)
"""Modules whose inside is not looked into; whatever feeds them is frozen."""


@dataclass(slots=True)
class WeightUse:
    """How often a weight multiplies: `positions` over the whole batch, output size of the first call, its stride."""

    positions: int = 0
    spatial: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


@dataclass(slots=True)
class Trace:
    """What one forward pass showed. Modules go by name ("" is the model itself), weights by id.

    `owners` are the modules that hold a Parameter, `users` those in whose forward it multiplies, `shared` says of
    modules whose Parameter is another module's too which one that is, `touched` are the ids of all that anything reads.
    """

    order: dict[str, int] = field(default_factory=dict)
    uses: dict[int, WeightUse] = field(default_factory=dict)
    owners: dict[int, list[str]] = field(default_factory=dict)
    users: dict[int, set[str]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    touched: set[int] = field(default_factory=set)
    producers: dict[Node, str] = field(default_factory=dict)
    inputs: dict[str, list[Node]] = field(default_factory=dict)
    outputs: list[Node] = field(default_factory=list)
    decisions: dict[str, str] = field(default_factory=dict)
    suspects: list[tuple[int, str, list[Node]]] = field(default_factory=list)

    def sources(self, nodes: Iterable[Node]) -> set[str]:
        """Producers whose channels arrive at `nodes` without passing another producer."""
        found: set[str] = set()
        seen: set[Node] = set()
        stack = [n for n in nodes if n is not None]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.producers:
                found.add(self.producers[node])
            else:
                stack.extend(n for n, _ in getattr(node, "next_functions", ()) if n is not None)
        return found


def watch(model: nn.Module, inputs: Sequence[Any]) -> Trace:
    """Run `model` once on `inputs` and record; the model is a private copy whose parameters want gradients.

    Raises:
        InputError: the model does not run on these inputs.
    """
    trace = Trace()
    stack: list[str] = []
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            others = trace.owners.setdefault(id(parameter), [])
            if others and others[-1] != name:
                said = "its {} is one Parameter with that of {!r}"
                trace.shared.setdefault(name, said.format(own, others[0]))
                trace.shared.setdefault(others[0], said.format(own, name))
            others.append(name)
    with _hooks(model, trace, stack):
        try:
            with _Watcher(model, trace, stack, inputs):
                output = call_model(model, inputs)
        except Exception as error:  # the user's forward may fail in any way
            where = f" in {stack[-1]!r}" if stack and stack[-1] else ""
            raise InputError(
                f"{type(model).__name__} does not run on its example inputs{where}: {one_line(error)}"
            ) from error
    trace.outputs = _nodes(output)
    return trace


def is_producer(module: nn.Module) -> bool:
    """Whether a module makes new channels: a conv that is not depthwise, a linear, an embedding."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return not is_depthwise(module)
    return isinstance(module, nn.Linear | nn.Embedding)


def is_depthwise(module: nn.Module) -> bool:
    """Whether a conv passes every channel on by itself."""
    if not isinstance(module, nn.modules.conv._ConvNd) or module.groups == 1:
        return False
    return module.groups == module.in_channels == module.out_channels


def multiplies(module: nn.Module) -> bool:
    """Whether a conv makes several channels of every channel by itself: depthwise with a multiplier."""
    if not isinstance(module, nn.modules.conv._ConvNd) or module.transposed:
        return False
    return 1 < module.groups == module.in_channels < module.out_channels


@contextmanager
def _hooks(model: nn.Module, trace: Trace, stack: list[str]) -> Iterator[None]:
    handles, closed = [], []
    for name, module in model.named_modules():
        enter, leave = _enter(name, trace, stack), _leave(name, trace, stack, is_producer(module))
        if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
            closed.append(module)
            module.__dict__["forward"] = _between(module, module.forward, enter, leave)
            continue
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in closed:
            del module.__dict__["forward"]


def _between(
    module: nn.Module, forward: Callable[..., Any], enter: Callable[..., None], leave: Callable[..., None]
) -> Callable[..., Any]:
    """`forward` with what hooks would do before and after it."""

    def called(*args: Any, **kwargs: Any) -> Any:
        enter(module, args, kwargs)
        output = forward(*args, **kwargs)
        leave(module, args, output)
        return output

    return called


def _enter(name: str, trace: Trace, stack: list[str]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        stack.append(name)
        trace.order.setdefault(name, len(trace.order))
        trace.inputs.setdefault(name, []).extend(_nodes((args, kwargs)))

    return hook


def _leave(name: str, trace: Trace, stack: list[str], producer: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()
        if producer:
            trace.producers.update(dict.fromkeys(_nodes(output), name))

    return hook


class _Watcher(TorchFunctionMode):
    """Sees every torch function of the pass; `tainted` holds tensors that depend on the inputs (by id, kept alive)."""

    def __init__(self, model: nn.Module, trace: Trace, stack: list[str], inputs: Sequence[Any]) -> None:
        super().__init__()
        self._trace, self._stack = trace, stack
        self._names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
        self._layers = {
            id(t) for m in model.modules() if _is_layer(m) for t in (*m.parameters(False), *m.buffers(False))
        }
        self._tainted: dict[int, Tensor] = {id(t): t for t in _tensors(tuple(inputs))}
        self._last: dict[int, Tensor] = {}  # those whose channels lie along the last of four dimensions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        here = self._stack[-1] if self._stack else ""
        given = [t for t in _tensors((args, kwargs)) if id(t) in self._tainted]
        name = getattr(func, "__name__", "")
        if given and name in DECISIONS:
            self._trace.decisions.setdefault(here, name)
        result = func(*args, **kwargs)
        self._trace.touched.update(id(t) for t in _tensors((args, kwargs)) if isinstance(t, nn.Parameter))
        if given and not (name in LIKE and id(args[0]) not in self._tainted):
            self._tainted.update({id(t): t for t in _tensors(result)})
            if lie_last(name, args, kwargs, result, lambda t: id(t) in self._last):
                self._last[id(result)] = result
            tainted = self._tainted.__contains__
            seen = Seen(name, given[0], args, kwargs, result, lambda t: tainted(id(t)), id(given[0]) in self._last)
            found = suspicion(seen) or self._own_tensor(func, args, kwargs, given[0], here)
            if found is not None:
                self._trace.suspects.append((*found, _nodes(given)))
        self._record_weight(func, args, kwargs, result, here)
        return result

    def _own_tensor(self, func: Any, args: Any, kwargs: Any, x: Tensor, here: str) -> tuple[int, str] | None:
        """(rank, words) where a forward brings a tensor of its own that no layer narrows along with the channels."""
        place = repr(here) if here else "the model's forward"
        if func is F.linear or func in CONVS or func in TRANSPOSED:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if id(weight) not in self._names and id(weight) not in self._tainted:
                return 1, f"{place} computes a weight in every forward, which is not narrowed with its channels; {BAKE}"
            many = kwargs.get("groups", args[6] if len(args) > 6 else 1) if func is not F.linear else 1
            if many > 1 and id(weight) in self._names and id(weight) not in self._layers:
                shown = f"{self._names[id(weight)]} {list(weight.shape)}"
                return 1, f"{place} convolves with {shown} in a number of groups that does not follow its channels"
        for other in _tensors((args, kwargs)):
            known = id(other) in self._tainted or id(other) in self._layers
            if not known and along_channels(getattr(func, "__name__", ""), x, other):
                shown = f"{self._names.get(id(other), 'a tensor')} {list(other.shape)}"
                return 3, f"{place} lays {shown} along its channels, which is not narrowed with them"
        return None

    def _record_weight(self, func: Any, args: Any, kwargs: Any, result: Any, here: str) -> None:
        call = parse_call(func, args, kwargs)
        if call is None:
            return
        x, weight = call.x, call.weight
        if id(weight) not in self._names:
            return
        self._trace.users.setdefault(id(weight), set()).add(here)
        use = self._trace.uses.setdefault(id(weight), WeightUse())
        if call.kind in LINEAR:
            use.positions += x.numel() // max(x.shape[-1], 1)
            return
        spatial = weight.dim() - 2
        counted = x if func in TRANSPOSED else result
        use.positions += counted.numel() // max(counted.shape[-spatial - 1], 1)
        if not use.spatial:
            use.spatial, use.stride = tuple(result.shape[-spatial:]), call.stride


def _is_layer(module: nn.Module) -> bool:
    """Whether the trace knows what a module's own tensors do to its channels."""
    return is_producer(module) or type(module).__module__.startswith("torch.nn.modules.")


def _nodes(tree: Any) -> list[Node]:
    return [t.grad_fn for t in _tensors(tree) if t.grad_fn is not None]


def _tensors(tree: Any) -> list[Tensor]:
    leaves = tree_leaves(tree)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        leaves = [x for leaf in leaves if hasattr(leaf, "__dict__") and not callable(leaf) for x in vars(leaf).values()]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
