"""What an optimizer has learned of a dense model, carried over to the pruned one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.application.loader import point_of
from autoprune.errors import InputError
from autoprune.structure import Structure
from autoprune.tracing.copies import unwrapped
from autoprune.tracing.slim import kept_positions, named_tensors


def transfer_optimizer(optimizer: torch.optim.Optimizer, dense: nn.Module, small: nn.Module) -> torch.optim.Optimizer:
    """An optimizer over `small`, a model of `apply` or `load`, that goes on where `optimizer` stands with `dense`.

    It has the class, the groups and the settings of `optimizer`; momenta and the like follow the removal, position by
    position. Parameters that only `small` has join the last group, without a state; a state that is not shaped like its
    parameter (a factored one) begins anew. A scheduler is to be made anew over what is returned.

    Raises:
        InputError: `small` does not come from autoprune, `dense` is not its dense model, or `optimizer` has other
            parameters than those of `dense`.
    """
    dense, small = unwrapped(dense), unwrapped(small)
    names = {id(p): name for name, p in dense.named_parameters()}
    shapes = {name: tuple(t.shape) for name, t in named_tensors(dense).items()}
    point = point_of(small)
    lacking = [s.tensor for g in point.base.groups for s in g.slices if s.tensor not in shapes]
    if lacking:
        raise InputError(f"transfer_optimizer: the dense model has no {lacking[0]!r}; give the model that was pruned")
    kept = kept_positions(Structure(point.base.groups, ()), point.keep, shapes)
    targets, groups = dict(small.named_parameters()), []
    for group in optimizer.param_groups:
        foreign = [p for p in group["params"] if id(p) not in names]
        if foreign:
            shape = list(foreign[0].shape)
            raise InputError(f"transfer_optimizer: the optimizer's parameter {shape} is none of the dense model")
        mine = [targets[names[id(p)]] for p in group["params"] if names[id(p)] in targets]
        groups.append({**{k: copy.deepcopy(v) for k, v in group.items() if k != "params"}, "params": mine})
    held = {id(p) for group in groups for p in group["params"]}
    groups[-1]["params"] += [p for name, p in targets.items() if id(p) not in held and name not in shapes]
    made: torch.optim.Optimizer = type(optimizer)([g for g in groups if g["params"]], **_defaults(optimizer))
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        if name in targets and _follows(state, parameter):
            made.state[targets[name]] = _followed(state, name, targets[name], kept)
    return made


def _defaults(optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
    """What its class wants beside the groups: a rate, which each group has too."""
    return {"lr": optimizer.defaults["lr"]} if "lr" in optimizer.defaults else {}


def _follows(state: Mapping[str, Any], parameter: Tensor) -> bool:
    """Whether all that is kept of a parameter is one value, or one for each of its own."""
    tensors = (value for value in state.values() if isinstance(value, Tensor))
    return all(value.dim() == 0 or value.shape == parameter.shape for value in tensors)


def _followed(
    state: Mapping[str, Any], name: str, target: Tensor, kept: Mapping[tuple[str, int], Tensor]
) -> dict[str, Any]:
    """The state of a parameter at the positions that are left of it."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            found[key] = copy.deepcopy(value)
            continue
        for dim in range(value.dim()):
            if (where := kept.get((name, dim))) is not None:
                value = value.index_select(dim, where.to(value.device))
        found[key] = value.detach().clone().to(target.device)
    return found
