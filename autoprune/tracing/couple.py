"""Which channels hang together, by torch-pruning's DependencyGraph (Fang et al. 2023): the only file that knows it.

Its closures are hypotheses: it couples padded shortcuts wrongly and takes every unknown operation for element-wise.
"""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch_pruning.dependency import index_mapping, shape_infer

from autoprune.errors import InputError, one_line
from autoprune.tracing.copies import float_tensors, private_copy
from autoprune.tracing.inputs import call_model
from autoprune.tracing.spread import IntArray, Spread, follows, spread_channels
from autoprune.tracing.watch import OPAQUE, is_depthwise, is_producer

Side = Literal["out", "in", "carry", "size"]
"""`size` is a number of a module's own that counts channels."""


@dataclass(frozen=True, slots=True)
class Reach:
    """Where a closure arrives: root channel `roots[i]` owns `positions[i]` on a side of the module (or raw parameter).

    `dim` is the dimension of a raw parameter, and None for a module. `lost` names the operation where the trace loses
    the channels; `name` is then nobody's.
    """

    name: str
    side: Side
    roots: IntArray
    positions: IntArray
    dim: int | None = None
    lost: str = ""


@dataclass(frozen=True, slots=True)
class Closure:
    """Everything that would be cut together with the channels on a side of `root`: the output of a module.

    `dim` is the dimension of a raw tensor, and None for a module.
    """

    root: str
    reaches: tuple[Reach, ...]
    side: Side = "out"
    dim: int | None = None


def closures(model: nn.Module, inputs: Sequence[Any]) -> tuple[Closure, ...]:
    """One closure for every producer that the graph knows, unless an earlier one covers all its channels.

    Raises:
        InputError: torch-pruning cannot trace the model.
    """
    twin = _ungrouped(_opaque(private_copy(model)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _graph(_Framed(twin, inputs), tuple(inputs))
            return _all_closures(graph, _lost(graph), twin)
    except InputError:
        raise
    except Exception as error:  # torch-pruning asserts and indexes where a graph surprises it
        raise InputError(f"{type(model).__name__} cannot be traced for pruning: {one_line(error)}") from error


def _graph(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """torch-pruning's graph as its `build_dependency` makes it, but for the index mappings."""
    graph = tp.DependencyGraph()
    graph.verbose, graph.model, graph.ignored_params = False, model, []
    graph._module2name = {module: name for name, module in model.named_modules()}
    graph._param_to_name, graph.unwrapped_parameters = graph._detect_unwrapped_parameters(None)
    graph.module2node = graph._trace(model, inputs, _forward, output_transform=_with_gradient)
    graph._build_dependency(graph.module2node)
    for module in graph.module2node:
        if isinstance(module, tp.ops._SliceOp):
            _count_from_the_start(module)
    return graph


def _count_from_the_start(cut: Any) -> None:
    """Places that a slice counts from the end (x[:, -1:]) are saved as unsigned numbers: 2**64 - 1."""
    function = cut.grad_fn
    dim, sizes = function._saved_dim, function._saved_self_sym_sizes
    size = sizes[dim if dim < len(sizes) else dim - 2**64]
    start, end = (x if x < 2**63 else size + x - 2**64 for x in (cut.start, cut.end))
    cut.start, cut.end = max(start, 0), min(end, size)


def _lost(graph: Any) -> dict[Any, str]:
    """Give every node its index mapping; where torch-pruning fails at it, the node and the name of its operation.

    A node with the name "" is not walked through either, but experiments may prove the channels that arrive there.
    Node by node, because one operation that it cannot follow would otherwise cost the whole model.
    """
    lost = {}
    for stage in (shape_infer.init_shape_information, index_mapping.update_index_mapping):
        for module, node in graph.module2node.items():
            alone = copy.copy(graph)
            alone.module2node = {module: node}
            try:
                stage(alone)
            except Exception:  # it asserts and indexes where a graph surprises it
                lost[node] = _operation(node)
    for dep in (dep for node in graph.module2node.values() for dep in node.dependencies):
        if all(m is None or follows(m) for m in dep.index_mapping):
            continue
        ends = [n for n in (dep.source, dep.target) if type(n.module).__module__ == tp.ops.__name__]  # not a layer
        lost |= {node: _operation(node) for node in ends}
    return lost | dict.fromkeys(filter(_picks_one, graph.module2node.values()), "")


def _picks_one(node: Any) -> bool:
    """Whether a node takes one channel by its number (x * x[:, -1:]): it is broadcast, not coupled to the first."""
    cut = node.module
    if not isinstance(cut, tp.ops._SliceOp) or cut.end - cut.start != 1:
        return False
    maps = (m for dep in node.dependencies for m in dep.index_mapping)
    along_channels = any(isinstance(m, index_mapping._SliceIndexMapping) for m in maps)
    return along_channels and not all(isinstance(reader.module, tp.ops._ConcatOp) for reader in node.outputs)


def _operation(node: Any) -> str:
    """SplitWithSizesBackward0 -> split with sizes."""
    name = node.grad_fn.name() if hasattr(node.grad_fn, "name") else type(node.module).__name__
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.split("Backward")[0].strip("_")).lower()


def _all_closures(graph: Any, lost: Mapping[Any, str], model: nn.Module) -> tuple[Closure, ...]:
    names = {module: name for name, module in model.named_modules()}
    sides = (graph.get_in_channels, graph.get_out_channels)
    widest = max(size(node) or 0 for node in graph.module2node.values() for size in sides)
    found: list[Closure] = []
    covered: dict[str, set[int]] = {}
    for module, name in names.items():
        if not is_producer(module) or module not in graph.module2node:
            continue
        channels = graph.get_pruner_of_module(module).get_out_channels(module)
        if covered.get(name, set()).issuperset(range(channels)):
            continue
        closure = Closure(name, tuple(_reaches(graph, lost, names, spread_channels(graph, lost, module, widest))))
        found.append(closure)
        for reach in closure.reaches:
            if reach.side == "out":
                covered.setdefault(reach.name, set()).update(reach.positions.tolist())
    return tuple(found)


def _reaches(graph: Any, lost: Mapping[Any, str], names: Mapping[Any, str], spread: Spread) -> Iterator[Reach]:
    root = next(iter(spread.arrived))[0].module
    for (node, handler), roots in spread.arrived.items():
        positions = np.nonzero(roots >= 0)[0]
        roots = roots[positions]
        if node in lost:
            yield Reach(f"<{node.module}>", "carry", roots, positions, None, lost[node])
        elif isinstance(node.module, nn.Parameter):
            name = graph._param_to_name[node.module].removeprefix("model.")
            yield Reach(name, "carry", roots, positions, node.pruning_dim)
        elif node.module in names:
            side: Side = "carry"
            if is_producer(node.module):
                side = "out" if handler == graph.get_pruner_of_module(node.module).prune_out_channels else "in"
            yield Reach(names[node.module], side, roots, positions)
    yield from (Reach(names[root], "out", one, other) for one, other in spread.ties)


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
