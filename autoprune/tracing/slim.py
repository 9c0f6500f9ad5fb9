"""Physical removal: kept atoms -> kept positions of every tensor -> a smaller, plain model, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.errors import InputError, did_you_mean
from autoprune.structure import Group, Role, Slice, Structure
from autoprune.tracing.open_attention import open_attentions
from autoprune.tracing.sizes import set_sizes
from autoprune.tracing.stand_ins import leave_out
from autoprune.tracing.watch import multiplies

Keep = Mapping[str, Sequence[int]]
"""Group name -> kept atoms, ascending, in original coordinates; a group that is not named keeps all."""


def slim(model: nn.Module, structure: Structure, keep: Keep) -> None:
    """Remove every atom that `keep` does not list, in place; parameters and buffers keep their identity, grads go.

    What an absent block is made of is replaced by stand-ins.

    Raises:
        InputError: `keep` does not fit the structure, or the model is not the dense model of the structure.
    """
    open_attentions(model)
    tensors = named_tensors(model)
    shapes = {spec.name: spec.shape for op in structure.ops for spec in op.tensors}
    with torch.no_grad():
        taken: dict[str, Tensor] = {}
        for (name, dim), kept in kept_positions(structure, keep, shapes).items():
            tensor = taken.get(name, tensors[name].data)
            if tensor.shape[dim] != shapes[name][dim]:
                raise InputError(
                    f"{name!r} is {tensor.shape[dim]} wide in dimension {dim}, the dense model has "
                    f"{shapes[name][dim]}: this model was already pruned or is another one; start from the dense model"
                )
            taken[name] = _taken(tensor, dim, kept)
        while taken:
            name, value = taken.popitem()
            _replace(tensors[name], value)
    set_attributes(model, structure)
    set_sizes(model, structure, {name: len(kept) for name, kept in keep.items()})
    leave_out(model, absent(structure, {name: len(kept) for name, kept in keep.items()}))


def absent(structure: Structure, widths: Mapping[str, int]) -> list[Group]:
    """The blocks that `widths` leave out; a group that is not named is dense."""
    return [g for g in structure.groups if g.kind == "block" and widths.get(g.name, g.width) == 0]


def kept_positions(
    structure: Structure, keep: Keep, shapes: Mapping[str, Sequence[int]]
) -> dict[tuple[str, int], Tensor]:
    """(tensor, dim) -> kept positions, ascending, int64 [kept]; only for what gets narrower.

    `shapes` are the dense shapes of the tensors. Blocks are left aside: they go as whole modules.
    """
    gone = removed_positions(structure, keep, shapes, blocks=False)
    return {key: torch.nonzero(~removed).flatten() for key, removed in gone.items()}


def removed_positions(
    structure: Structure,
    keep: Keep,
    shapes: Mapping[str, Sequence[int]],
    role: Role | None = None,
    *,
    blocks: bool = True,
) -> dict[tuple[str, int], Tensor]:
    """(tensor, dim) -> bool [dense size], true where a position goes.

    Only slices of `role` where one is given, and not those of `blocks` where they are not wanted.
    """
    removed: dict[tuple[str, int], Tensor] = {}
    for name in keep:
        if name not in structure.names:
            raise InputError(f"`keep` names an unknown group {name!r}; {did_you_mean(name, structure.names)}")
    for group in (g for g in structure.groups if g.slices):
        gone = _removed_atoms(group, keep.get(group.name))
        if len(gone) == 0 or (group.kind == "block" and not blocks):
            continue
        for part in group.slices:
            if role is not None and part.role != role:
                continue
            key = (part.tensor, part.dim)
            if key not in removed:
                removed[key] = torch.zeros(shapes[part.tensor][part.dim], dtype=torch.bool)
            removed[key][positions_of(part, gone)] = True
    return removed


def positions_of(part: Slice, atoms: Tensor) -> Tensor:
    """Positions of `part.dim` that `atoms` (int64 [n]) own, flat, in the order of the atoms."""
    inside = atoms >= part.first
    if part.count is not None:
        inside &= atoms < part.first + part.count
    starts = part.offset + (atoms[inside] - part.first) * part.stride
    return (starts[:, None] + torch.arange(part.repeat)).flatten()


def set_attributes(model: nn.Module, structure: Structure | None = None) -> None:
    """Make in_channels, out_features, num_features, groups and the like agree with the tensors.

    A conv is depthwise if its attributes say so, or, where a `structure` is given, if it carries a group (with a
    multiplier: if an atom owns all that is made of a channel): only then is a grouped conv with one channel left in
    each conv group told from a depthwise one.
    """
    carried = None
    if structure is not None:
        each = {f"{n}.weight": _each(m) for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
        slices = [s for g in structure.groups if g.narrows for s in g.slices]
        made = {s.tensor for s in slices if each.get(s.tensor, 1) > 1 and s.repeat % each[s.tensor] == 0}
        carried = {s.tensor for s in slices if s.role == "carry"} | made
    for name, module in model.named_modules():
        for attribute, value in expected_attributes(module, None if carried is None else f"{name}.weight" in carried):
            if getattr(module, attribute) != value:
                setattr(module, attribute, value)


def expected_attributes(module: nn.Module, carries: bool | None = None) -> list[tuple[str, object]]:
    """(attribute, value) that the tensors of a module of torch.nn imply; empty for other modules."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        sized = weight if weight is not None else module.running_mean
        return [] if sized is None else [("num_features", sized.shape[0])]
    if not isinstance(weight, Tensor):
        return []
    if isinstance(module, nn.modules.conv._ConvNd):
        return _conv_attributes(module, weight, carries)
    if isinstance(module, nn.Linear):
        return [("out_features", weight.shape[0]), ("in_features", weight.shape[1])]
    if isinstance(module, nn.Embedding):
        return [("num_embeddings", weight.shape[0]), ("embedding_dim", weight.shape[1])]
    if isinstance(module, nn.PReLU):
        return [("num_parameters", weight.numel())]
    if isinstance(module, nn.GroupNorm):
        share = module.num_channels // module.num_groups  # whole norm groups go
        return [("num_channels", len(weight)), ("num_groups", max(len(weight) // share, 1))]
    return []


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their first name; a tensor shared by two modules comes once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _conv_attributes(conv: nn.modules.conv._ConvNd, weight: Tensor, carries: bool | None) -> list[tuple[str, object]]:
    groups = conv.groups
    looks_depthwise = groups > 1 and groups == conv.in_channels == conv.out_channels
    if weight.shape[1] == 1 and (looks_depthwise or multiplies(conv) if carries is None else carries):
        groups = weight.shape[0] // _each(conv)
    sides = [weight.shape[0], weight.shape[1] * groups]
    inner, outer = sides if conv.transposed else sides[::-1]
    return [("in_channels", inner), ("out_channels", outer), ("groups", groups)]


def _each(conv: nn.modules.conv._ConvNd) -> int:
    """Channels that a depthwise convolution makes of each one; also where a single one is left. 1 for other ones."""
    return conv.out_channels // conv.groups if conv.groups == conv.in_channels and not conv.transposed else 1


def _removed_atoms(group: Group, kept: Sequence[int] | None) -> Tensor:
    """Atoms that go, int64 [n]; InputError unless `kept` ascends within the group."""
    if kept is None:
        return torch.empty(0, dtype=torch.int64)
    chosen = torch.as_tensor(list(kept), dtype=torch.int64)
    if len(chosen) and (chosen[0] < 0 or chosen[-1] >= group.width or bool((chosen.diff() <= 0).any())):
        raise InputError(f"`keep` of {group.name!r} must ascend within 0..{group.width - 1}, not {list(kept)}")
    gone = torch.ones(group.width, dtype=torch.bool)
    gone[chosen] = False
    return torch.nonzero(gone).flatten()


def _taken(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    """Positions `kept` of `dim`; a view where they lie evenly, for large weights are slow to copy."""
    steps = kept.diff()
    if len(kept) == 0 or bool((steps != steps[:1]).any()):
        return tensor.index_select(dim, kept.to(tensor.device))
    step = int(steps[0]) if len(steps) else 1
    return tensor[(slice(None),) * dim + (slice(int(kept[0]), int(kept[-1]) + 1, step),)]


def _replace(tensor: Tensor, value: Tensor) -> None:
    """Give `tensor` new content of another shape: same object, same memory format, no stale gradient."""
    old = tensor.data
    channels_last = old.dim() == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    tensor.grad = None
    shared = value.untyped_storage().data_ptr() == old.untyped_storage().data_ptr()  # the old one would stay in memory
    tensor.data = value.clone(memory_format=layout) if shared else value.contiguous(memory_format=layout)
