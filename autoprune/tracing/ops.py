"""The operations that cost, as data: every module with tensors is an Op, and what has no weight is one constant."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autoprune.errors import InputError, one_line
from autoprune.structure import Group, Op, TensorSpec
from autoprune.tracing.claims import below
from autoprune.tracing.copies import private_copy, quiet_random_state, shadow
from autoprune.tracing.inputs import batch_size, call_model, on_device
from autoprune.tracing.rounding import output_dim
from autoprune.tracing.slim import named_tensors
from autoprune.tracing.watch import Trace, WeightUse

CONSTANT = "(matmul)"
"""Name of the operation that holds the MACs without a weight: attention, einsum, generated kernels."""


ATTENTION = "(attention)"
"""Name of the products of a model that is an attention itself."""


def count_macs(model: nn.Module, example_inputs: Any, samples: int | None = None) -> int:
    """MACs a sample, by FlopCounterMode (2 a MAC) on the meta device, or on the model's own where meta cannot run it.

    `samples` is how many samples the inputs are; by default dimension 0 tells.

    Raises:
        InputError: the model runs on neither.
    """
    batch = batch_size(example_inputs) if samples is None else samples
    try:
        return macs_of(shadow(model), example_inputs, batch)
    except InputError:
        raise
    except Exception:  # meta has no values: .item() and custom kernels fail in many ways
        try:
            total = _flops(private_copy(model), example_inputs)
        except Exception as error:
            raise InputError(f"{type(model).__name__} does not run on its example inputs: {one_line(error)}") from error
    return total // (2 * batch)


def macs_of(unreal: nn.Module, inputs: Any, samples: int) -> int:
    """MACs a sample of a model on the meta device; whatever its forward raises there goes through."""
    return _flops(unreal, on_device(inputs, "meta")) // (2 * samples)


def operations(model: nn.Module, trace: Trace, batch: int, macs: int) -> tuple[Op, ...]:
    """All Ops in execution order (modules that never ran last), so that their polynomial is `macs` when dense."""
    names = {id(tensor): name for name, tensor in named_tensors(model).items()}
    ops: list[Op] = []
    seen: set[int] = set()
    for name, module in _in_order(model, trace):
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        mine = [t for t in own if id(t) not in seen]  # a tied tensor belongs to the module that runs first
        seen.update(id(t) for t in mine)
        # an Op has one weight: the first that multiplies keeps the module's other tensors, each further one is alone
        used = [t for t in mine if id(t) in trace.uses and trace.uses[id(t)].positions % batch == 0]
        for i, weight in enumerate(used or ([None] if mine else [])):
            tensors = [t for t in mine if t is weight or (i == 0 and not any(t is u for u in used))]
            label = (name or "(model)") if i == 0 else names[id(weight)]
            ops.append(_op(label, module, weight, tensors, trace, batch, names, len(ops)))
    shapes = {spec.name: spec.shape for op in ops for spec in op.tensors}
    constant = macs - sum(op.positions * prod(shapes[op.weight]) for op in ops if op.weight is not None)
    if constant:
        ops.append(Op(CONSTANT, "matmul", len(ops), positions=constant))
    return tuple(ops)


def with_groups(
    ops: Sequence[Op], groups: Sequence[Group], products: Mapping[str, int] | None = None
) -> tuple[Op, ...]:
    """The same operations, each naming the groups that scale it, in the order of `groups`.

    `products` says by module how many MACs a sample it spends without a weight. Those of an attention follow its
    heads and its block: they become an operation of their own, whose MACs are `positions` at the dense widths of its
    groups and in proportion to others.
    """
    touched = [(g.name, {s.tensor for s in g.slices}) for g in groups]
    named = [
        op
        if op.weight is None and op.groups
        else replace(op, groups=tuple(name for name, tensors in touched if tensors & {t.name for t in op.tensors}))
        for op in ops
    ]
    return tuple(named) if not products else _attending(named, groups, products)


def _attending(ops: Sequence[Op], groups: Sequence[Group], products: Mapping[str, int]) -> tuple[Op, ...]:
    """`ops` with the products of every attention whose heads are a group, or which is a block, out of the constant."""
    places: dict[str, tuple[Group, ...]] = {}
    for group in (g for g in groups if g.kind in ("head", "kv_group")):
        place = common_module(s.tensor for s in group.slices)
        while place and place not in products:  # a list of layers runs nothing itself
            place = place.rpartition(".")[0]
        if products.get(place, 0) and products[place] % group.width == 0:
            places[place] = (group,)
    spent = {p: products[p] for p in places if not any(o != p and below(o, p) for o in places)}
    places = {p: places[p] for p in spent}
    rest = sum(op.positions for op in ops if op.name == CONSTANT) - sum(spent.values())
    for block in (g for g in groups if g.kind == "block"):
        for own in (s.module for s in block.stands if products.get(s.module, 0)):
            place = next((p for p in places if below(p, own) or below(own, p)), own)
            if place not in spent:
                rest -= products[own]
            elif products[own] < spent[place]:  # one of several attentions whose heads go together
                spent[place] -= products[own]
                place, places[own] = own, places[place]
            spent[place] = products[own] if place == own else spent[place]
            places[place] = (*places.get(place, ()), block)
    kept = [op for op in ops if op.name != CONSTANT]
    for place, some in places.items():
        name = f"{place} {CONSTANT}" if place else ATTENTION
        kept.append(Op(name, "matmul", len(kept), positions=spent[place], groups=tuple(g.name for g in some)))
    return (*kept, Op(CONSTANT, "matmul", len(kept), positions=rest)) if rest else tuple(kept)


def common_module(tensors: Iterable[str]) -> str:
    """The innermost module that holds all these tensors."""
    paths = [tensor.split(".")[:-1] for tensor in tensors]
    alike = next((i for i, names in enumerate(zip(*paths, strict=False)) if len(set(names)) > 1), min(map(len, paths)))
    return ".".join(paths[0][:alike])


def products_of(model: nn.Module, inputs: Any, samples: int, ops: Sequence[Op]) -> dict[str, int]:
    """Module -> MACs a sample that it and those in it spend without a weight, of all modules that count some MACs.

    `ops` are the operations of these inputs; the model may lie on the meta device.
    """
    if all(op.name != CONSTANT for op in ops):
        return {}
    shapes = {spec.name: spec.shape for op in ops for spec in op.tensors}
    counted, found = _by_module(model, inputs), {}
    for name, _ in model.named_modules():
        own = [op for op in ops if op.weight is not None and (not name or op.weight.startswith(f"{name}."))]
        if name in counted:
            with_weight = sum(op.positions * prod(shapes[str(op.weight)]) for op in own)
            found[name] = max(counted[name] // (2 * samples) - with_weight, 0)
    return found


def _op(
    name: str,
    module: nn.Module,
    weight: Tensor | None,
    tensors: Sequence[Tensor],
    trace: Trace,
    batch: int,
    names: Mapping[int, str],
    depth: int,
) -> Op:
    use = WeightUse() if weight is None else trace.uses[id(weight)]
    return Op(
        name=name,
        type=type(module).__name__,
        depth=depth,
        positions=use.positions // batch,
        weight=None if weight is None else names[id(weight)],
        kernel=() if weight is None else tuple(weight.shape[2:]),
        stride=use.stride,
        spatial=use.spatial,
        tensors=tuple(
            TensorSpec(names[id(t)], tuple(t.shape), t.element_size(), id(t) in trace.owners) for t in tensors
        ),
        outputs=output_dim(module),
    )


def _in_order(model: nn.Module, trace: Trace) -> list[tuple[str, nn.Module]]:
    late = len(trace.order)
    return sorted(model.named_modules(), key=lambda pair: trace.order.get(pair[0], late))


def _flops(model: nn.Module, inputs: Any) -> int:
    return sum(_counted(model, inputs).get("Global", {}).values())


def _by_module(model: nn.Module, inputs: Any) -> dict[str, int]:
    """Module -> FLOPs in its forward passes, on the meta device where it runs there.

    The counter puts the class of the model before all names.
    """
    try:
        unreal = shadow(model)
        counts = _counted(unreal, on_device(inputs, "meta"))
    except Exception:  # as in `count_macs`
        counts = _counted(private_copy(model), inputs)
    return {name.partition(".")[2]: sum(ops.values()) for name, ops in counts.items()}


def _counted(model: nn.Module, inputs: Any) -> dict[str, dict[Any, int]]:
    # the counter knows no fused attention of CPUs, and none without gradients
    with (
        quiet_random_state(0),
        warnings.catch_warnings(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        warnings.simplefilter("ignore")
        call_model(model, inputs)
    return {str(name): dict(ops) for name, ops in counter.get_flop_counts().items()}
