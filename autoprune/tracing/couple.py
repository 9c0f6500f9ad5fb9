"""Which channels hang together, by torch-pruning's DependencyGraph (Fang et al. 2023): the only file that knows it.

Its closures are hypotheses: it couples padded shortcuts wrongly and takes every unknown operation for element-wise.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from autoprune.errors import InputError, one_line
from autoprune.tracing.copies import float_tensors, private_copy
from autoprune.tracing.inputs import call_model
from autoprune.tracing.watch import OPAQUE, is_depthwise, is_producer

Side = Literal["out", "in", "carry"]


@dataclass(frozen=True, slots=True)
class Reach:
    """Where a closure arrives: root channel `roots[i]` owns `positions[i]` on a side of the module (or raw parameter).

    `dim` is the dimension of a raw parameter, and None for a module.
    """

    name: str
    side: Side
    roots: tuple[int, ...]
    positions: tuple[int, ...]
    dim: int | None = None


@dataclass(frozen=True, slots=True)
class Closure:
    """Everything that torch-pruning would cut together with the output channels of module `root`."""

    root: str
    reaches: tuple[Reach, ...]


def closures(model: nn.Module, inputs: Sequence[Any]) -> tuple[Closure, ...]:
    """One closure for every producer that the graph knows, unless an earlier one covers all its channels.

    Raises:
        InputError: torch-pruning cannot trace the model.
    """
    twin = _ungrouped(_opaque(private_copy(model)))
    graph = tp.DependencyGraph()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph.build_dependency(
                _Framed(twin, inputs), tuple(inputs), _forward, output_transform=_with_gradient, verbose=False
            )
            return _all_closures(graph, twin)
    except InputError:
        raise
    except Exception as error:  # torch-pruning asserts and indexes where a graph surprises it
        raise InputError(f"{type(model).__name__} cannot be traced for pruning: {one_line(error)}") from error


def _all_closures(graph: Any, model: nn.Module) -> tuple[Closure, ...]:
    names = {module: name for name, module in model.named_modules()}
    found: list[Closure] = []
    covered: dict[str, set[int]] = {}
    for module, name in names.items():
        if not is_producer(module) or module not in graph.module2node:
            continue
        pruner = graph.get_pruner_of_module(module)
        channels = range(pruner.get_out_channels(module))
        if covered.get(name, set()).issuperset(channels):
            continue
        closure = _closure(graph, name, graph.get_pruning_group(module, pruner.prune_out_channels, channels), names)
        found.append(closure)
        for reach in closure.reaches:
            if reach.side == "out":
                covered.setdefault(reach.name, set()).update(reach.positions)
    return tuple(found)


def _closure(graph: Any, root: str, group: Any, names: dict[Any, str]) -> Closure:
    reaches = []
    for item in group:
        target = item.dep.target
        roots, positions = tuple(item.root_idxs), tuple(item.idxs)
        if isinstance(target.module, nn.Parameter):
            name = graph._param_to_name[target.module].removeprefix("model.")
            reaches.append(Reach(name, "carry", roots, positions, target.pruning_dim))
        elif target.module in names:
            side: Side = "carry"
            if is_producer(target.module):
                pruner = graph.get_pruner_of_module(target.module)
                side = "out" if item.dep.handler == pruner.prune_out_channels else "in"
            reaches.append(Reach(names[target.module], side, roots, positions))
    return Closure(root, tuple(reaches))


class _Framed(nn.Module):
    """The model behind a norm for every input: the graph then knows how many channels an input brings to a concat."""

    def __init__(self, model: nn.Module, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.model = model
        leaves = enumerate(tree_leaves(tuple(inputs)))
        self.frames = nn.ModuleDict({str(i): _Frame(x) for i, x in leaves if _has_channels(x)})

    def forward(self, *inputs: Any) -> Any:
        leaves, shape = tree_flatten(inputs)
        framed = [self.frames[str(i)](x) if str(i) in self.frames else x for i, x in enumerate(leaves)]
        return call_model(self.model, tree_unflatten(framed, shape))


class _Frame(nn.modules.batchnorm._BatchNorm):
    def __init__(self, x: Tensor) -> None:
        super().__init__(x.shape[1], device=x.device, dtype=x.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def _opaque(model: nn.Module) -> nn.Module:
    """Make each recurrent or attention module one element-wise operation, in place.

    Their inside breaks torch-pruning's index mappings, and the one error would cost the whole model its groups.
    """
    for module in list(model.modules()):
        if isinstance(module, OPAQUE):
            module.__dict__["forward"] = functools.partial(_linked, module.forward)
    return model


def _linked(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `forward` gives, tied to its inputs by nothing but a zero."""
    link = sum(t.sum() * 0.0 for t in float_tensors((args, kwargs)))
    with torch.no_grad():
        output = forward(*args, **kwargs)
    return tree_map(lambda t: t + link if isinstance(t, Tensor) and t.is_floating_point() else t, output)


def _ungrouped(model: nn.Module) -> nn.Module:
    """Replace each grouped conv by a full one of the same sizes, in place: torch-pruning ties a grouped one's sides.

    Which channels must go together to keep the conv groups alike is added afterwards, by `atoms`.
    """
    for parent in list(model.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, nn.modules.conv._ConvNd) and conv.groups > 1 and not is_depthwise(conv):
                full = copy.copy(conv)
                full._parameters = dict(conv._parameters)
                sides = (conv.in_channels, conv.out_channels)
                shape = (*(sides if conv.transposed else sides[::-1]), *conv.kernel_size)
                full.groups = 1
                full.weight = nn.Parameter(conv.weight.new_zeros(shape))
                parent._modules[name] = full
    return model


def _has_channels(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 and x.shape[1] > 1


def _forward(model: nn.Module, inputs: Any) -> Any:
    return model(*inputs)


def _with_gradient(output: Any) -> list[Tensor]:
    return [t for t in float_tensors(output) if t.grad_fn is not None]
