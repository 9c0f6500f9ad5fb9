"""Copies of a lent model that may be traced, cut and scattered without the original noticing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoprune.errors import InputError, one_line
from autoprune.tracing.open_attention import open_attentions


def private_copy(model: nn.Module, instead: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy in eval mode whose floating parameters all want gradients and have none.

    `instead` holds, by id, what stands in the copy for things that need no copy.

    Raises:
        InputError: the model cannot be copied, or its forward cannot be looked into.
    """
    _refuse_closed(model)
    twin = copied(model, instead)
    for parameter in twin.parameters():
        parameter.grad = None
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(True)
    return twin.eval()


def shadow(model: nn.Module) -> nn.Module:
    """A private copy on the meta device, which has shapes and no numbers; the weights are never copied.

    Raises:
        InputError: the model cannot be copied, or its forward cannot be looked into.
    """
    plain = (p for p in model.parameters() if type(p) is nn.Parameter)
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in plain}
    return private_copy(model, empty).to("meta")


def sharing(model: nn.Module) -> nn.Module:
    """A twin with the very tensors of `model`: two forwards may be under way, and neither sees what the other notes.

    Raises:
        InputError: the model cannot be copied.
    """
    held = [t for m in model.modules() for t in tree_leaves([*vars(m).values()]) if isinstance(t, Tensor)]
    return copied(model, {id(t): t for t in held})


def copied(model: nn.Module, instead: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy of a lent model as it is, also of one that was just trained; what was compiled runs uncompiled.

    `instead` is that of `private_copy`.

    Raises:
        InputError: the model cannot be copied.
    """
    # Hook-based weight_norm keeps a computed, non-leaf `weight`, and models keep what they last computed: deepcopy
    # refuses both, so hand them over as constants.
    memo: dict[int, Any] = dict(instead or {})
    for module in model.modules():
        for value in tree_leaves([*vars(module).values()]):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    try:
        with torch.no_grad():  # TorchScript copies its parameters as if they were computed
            twin = copy.deepcopy(model, memo)
    except Exception as error:  # a user's module may refuse in any way
        raise InputError(
            f"{type(model).__name__} cannot be copied: {one_line(error)}; it must survive copy.deepcopy"
        ) from error
    lent = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        if not isinstance(parameter, nn.Parameter):  # TorchScript's have become plain tensors
            parameter._is_param = True
            parameter.requires_grad_(lent[name].requires_grad)
    for module in twin.modules():  # whose forward a copy compiles again, for ever other widths and hooks
        if unwrapped(module) is not module and hasattr(module, "_orig_mod"):
            module.__dict__["forward"] = unwrapped(module).__call__
    return open_attentions(twin)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def check_module(model: object) -> None:
    """InputError unless `model` is a module: a class of modules is not."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise InputError(f"model must be a torch.nn.Module that can be called, not {what}")


def _refuse_closed(model: nn.Module) -> None:
    """Raise InputError for what cannot be copied or looked into, and say what can."""
    check_module(model)
    for name, module in model.named_modules():
        what = f"the module {name!r}" if name else "the model"
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise InputError(f"{what} is wrapped in DistributedDataParallel: pass the model inside, its `.module`")
        if any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False)):
            raise InputError(f"{what} is lazy and was never run: run the model once, then its layers know their sizes")
    if isinstance(unwrapped(model), torch.jit.ScriptModule):
        raise InputError(
            "the model is TorchScript (torch.jit.script or trace), which is compiled and cannot be cut: "
            "use the plain nn.Module that it was made of"
        )


def to_double(value: Any) -> Any:
    """A tree with its floating tensors in fp64; rounding then never hides a wrong position."""
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)


def flat_output(value: Any) -> Tensor:
    """All floating tensors of a model's output in one flat tensor."""
    tensors = float_tensors(value)
    return torch.cat([t.reshape(-1).double() for t in tensors]) if tensors else torch.zeros(0)


def float_tensors(value: Any) -> list[Tensor]:
    """The floating tensors in a tree of outputs; objects that are no tree are searched through their attributes."""
    found = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    if not found and hasattr(value, "__dict__"):
        found = [leaf for leaf in tree_leaves(dict(vars(value))) if isinstance(leaf, Tensor)]
    return [t for t in found if t.is_floating_point()]


@contextmanager
def quiet_random_state(seed: int) -> Iterator[None]:
    """A forward pass that draws numbers draws the same ones, and the global torch generators do not notice."""
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        yield
