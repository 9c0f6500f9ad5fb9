"""How every weight is used in one forward pass: which batch norm reads it, and does it close a residual branch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from autoprune.tracing.calls import ADDS, LINEAR, parse_call, parse_norm, same_rows, undropped
from autoprune.tracing.inputs import call_model, on_device


@dataclass(frozen=True, slots=True)
class Site:
    """The use of one weight: by a conv, transposed conv or linear call.

    `norm` is the batch norm that alone reads the output; `closes` says that the output (behind the norm) goes into
    one addition and nowhere else; `overwritten` that the weight's input is written to before that addition. A weight
    that is called more than once has `calls` > 1 and neither; a norm that is called more than once reads no output
    alone.
    """

    weight: str
    kind: str
    groups: int
    bias: str | None
    norm: str | None
    closes: bool
    calls: int
    overwritten: bool = False


def find_sites(model: nn.Module, example_inputs: Any) -> dict[str, Site]:
    """Sites by weight name, in execution order; the model must be in eval mode and is left untouched."""
    flow = _Flow(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad(), flow:
        flow.returned = {id(t) for t in tree_leaves(call_model(model, on_device(example_inputs, device)))}
    sites = {name: flow.site(name) for name in flow.outputs}
    rivals: dict[int, list[str]] = {}
    for name, site in sites.items():
        if site.closes:
            rivals.setdefault(flow.closing_add(name), []).append(name)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    for names in rivals.values():  # of two branches that meet in one addition, the larger weight repairs the sum
        best = max(names, key=lambda n: (sizes[n], n))
        for name in names:
            if name != best:
                sites[name] = replace(sites[name], closes=False)
    return sites


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Batch norms with running statistics, by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


@dataclass
class _Use:
    order: int
    func: Any
    norm: str | None
    out: Tensor
    plain: bool
    reshapes: bool


@dataclass
class _Output:
    tensors: list[Tensor] = field(default_factory=list)
    kind: str = ""
    groups: int = 1
    bias: Tensor | None = None
    input: Tensor | None = None
    version: int = 0


class _Flow(TorchFunctionMode):
    """Records which tensor goes into which function; keeps all tensors alive so that identities stay unique."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: Mapping[int, str] = {id(p): n for n, p in model.named_parameters()}
        self.norms = {id(m.running_mean): n for n, m in batch_norms(model).items()}
        self.outputs: dict[str, _Output] = {}
        self.uses: dict[int, list[_Use]] = {}
        self.alive: list[Any] = []
        self.norm_calls: Counter[str] = Counter()
        self.returned: set[int] = set()
        self.overwritten: dict[int, frozenset[str]] = {}  # by the order of an addition: weights whose input is no more

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (same := undropped(func, args, kwargs)) is not None:
            return same
        if func in ADDS:
            stale = (n for n, o in self.outputs.items() if o.input is not None and o.input._version != o.version)
            self.overwritten[len(self.alive) + 1] = frozenset(stale)
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            return out
        self.alive.append((args, kwargs, out))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)]
        bn = parse_norm(func, args, kwargs)
        norm = self.norms.get(id(bn.mean)) if bn is not None else None
        if norm is not None:
            self.norm_calls[norm] += 1
        plain = not kwargs.get("alpha") and len(inputs) == 2 and inputs[0].shape == inputs[1].shape
        use = _Use(len(self.alive), func, norm, out, plain, same_rows(func, args, out))
        for tensor in inputs:
            self.uses.setdefault(id(tensor), []).append(use)
        call = parse_call(func, args, kwargs)
        if call is not None and id(call.weight) in self.names:
            seen = self.outputs.setdefault(self.names[id(call.weight)], _Output())
            seen.tensors.append(out)
            seen.kind, seen.groups, seen.bias = call.kind, call.groups, call.bias
            seen.input, seen.version = call.x, call.x._version
        return out

    def site(self, name: str) -> Site:
        o = self.outputs[name]
        bias = self.names.get(id(o.bias)) if o.bias is not None else None
        once = len(o.tensors) == 1
        norm = self._norm_use(name) if once else None
        add = self.closing_add(name) if once else -1
        overwritten = name in self.overwritten.get(add, ())
        return Site(name, o.kind, o.groups, bias, norm.norm if norm else None, add >= 0, len(o.tensors), overwritten)

    def closing_add(self, name: str) -> int:
        """Order of the one addition that reads the output (behind its norm, in another shape); -1 if none does."""
        norm = self._norm_use(name)
        tensor = norm.out if norm else self.outputs[name].tensors[0]
        uses = self.uses.get(id(tensor), [])
        while len(uses) == 1 and uses[0].reshapes and self.outputs[name].kind in LINEAR:
            if id(tensor) in self.returned:
                return -1
            tensor = uses[0].out
            uses = self.uses.get(id(tensor), [])
        if not uses or uses[0].func not in ADDS or not uses[0].plain:
            return -1
        if id(tensor) in self.returned and uses[0].out is not tensor:
            return -1
        in_place = uses[0].out is tensor  # later uses are uses of the sum
        return uses[0].order if in_place or len(uses) == 1 else -1

    def _norm_use(self, name: str) -> _Use | None:
        tensor = self.outputs[name].tensors[0]
        uses = self.uses.get(id(tensor), [])
        if len(uses) != 1 or uses[0].norm is None or id(tensor) in self.returned:
            return None
        return uses[0] if self.norm_calls[uses[0].norm] == 1 else None
