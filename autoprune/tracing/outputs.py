"""What a model returns: which tensor of it counts, in a tuple, a dict, a dataclass or a library's output object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from autoprune.errors import InputError, did_you_mean, one_line
from autoprune.tracing.inputs import call_model
from autoprune.tracing.padding import without_padding

if TYPE_CHECKING:
    from autoprune.protocols import Batch, Task

Wanted = str | int | Callable[[Any], Tensor] | None
USUAL = "logits"


def faithful(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    """The output of `model` on `batch` that must stay faithful: what the task's `outputs` computes, or names.

    `outputs` is a method (model, batch) that may return the model's whole output, or a key or index of what the model
    returns for the inputs of a pair; without it that is chosen as in `pick_output`. Padded places hold
    the outputs of real tokens.

    Raises:
        InputError: there is no such output.
    """
    stated: Any = getattr(task, "outputs", None)
    if callable(stated):
        found = pick_output(stated(model, batch))
    else:
        paired = isinstance(batch, tuple | list) and len(batch) == 2
        found = pick_output(call_model(model, batch[0] if paired else batch), stated)
    # a model that computes in half precision for a while widens what lies in a tree, and an object is none
    return without_padding(found.float() if found.dtype in (torch.bfloat16, torch.float16) else found, batch)


def pick_output(returned: Any, wanted: Wanted = None) -> Tensor:
    """The tensor of `returned` at a key (or attribute), at an index, or that a function takes from it.

    Without any of them the key or attribute `logits`, else the first floating tensor.

    Raises:
        InputError: there is none.
    """
    found = _found(returned, wanted)
    if isinstance(found, Tensor):
        return found
    if wanted is None:
        raise InputError(f"the model returns {shown(returned)}, without a floating tensor; say which output counts")
    raise InputError(f"outputs={_named(wanted)} gives {shown(found)}, no tensor; the model returns {shown(returned)}")


def said_output(returned: Any, wanted: Wanted = None) -> str:
    """Which output counts, in words for a log; empty where there is only one."""
    if isinstance(returned, Tensor):
        return ""
    if wanted is not None:
        return f"output {_named(wanted)}"
    if _held(returned, USUAL) is not None:
        return f"output {USUAL!r}"
    first = next((path for path, leaf in _leaves(returned) if _floating(leaf)), "?")
    return f"the first floating tensor of the outputs, {first} (outputs= chooses another)"


def shown(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    held = _names(value)
    inside = f" with {', '.join(map(repr, held[:8]))}" if held else ""
    return f"a {type(value).__name__}{inside}"


def _found(returned: Any, wanted: Wanted) -> Any:
    if wanted is None:
        if isinstance(returned, Tensor):
            return returned
        usual = _held(returned, USUAL)
        return usual if usual is not None else next((leaf for _, leaf in _leaves(returned) if _floating(leaf)), None)
    if isinstance(wanted, str):
        found = _held(returned, wanted)
        if found is None:
            hint = did_you_mean(wanted, _names(returned)) if _names(returned) else "it has no names"
            raise InputError(f"outputs={wanted!r}: the model returns {shown(returned)}; {hint}")
        return found
    if isinstance(wanted, int):
        parts = list(returned) if isinstance(returned, tuple | list) else [_held(returned, n) for n in _names(returned)]
        if not -len(parts) <= wanted < len(parts):
            raise InputError(f"outputs={wanted}: the model returns {shown(returned)}, {len(parts)} of them")
        return parts[wanted]
    try:
        return wanted(returned)
    except Exception as error:  # a user's function may fail in any way
        raise InputError(f"outputs={_named(wanted)} failed on {shown(returned)}: {one_line(error)}") from error


def _held(value: Any, name: str) -> Any:
    """What `value` holds under a key or attribute; None where it does not."""
    if isinstance(value, Mapping):
        return value.get(name)
    return None if isinstance(value, Tensor) else getattr(value, name, None)


def _names(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [str(key) for key in value]
    fields = getattr(value, "_fields", None)
    return list(fields) if fields is not None else [n for n in getattr(value, "__dict__", ()) if not n.startswith("_")]


def _leaves(value: Any) -> list[tuple[str, Any]]:
    """Every leaf with its path; of an object that is no tree its attributes are the branches."""
    if isinstance(value, Mapping):
        value = dict(value)
    elif not isinstance(value, tuple | list | Tensor) and hasattr(value, "__dict__"):
        value = {name: getattr(value, name) for name in _names(value)}
    return [("".join(map(str, path)), leaf) for path, leaf in tree_flatten_with_path(value)[0]]


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _named(wanted: Wanted) -> str:
    return getattr(wanted, "__name__", repr(wanted)) if callable(wanted) else repr(wanted)
