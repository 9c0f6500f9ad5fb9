"""Weights from files into a model, with errors that name the tensors that do not fit and guess why."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autoprune.errors import InputError, one_line

MOST_NAMED = 3
WRAPPERS = {
    "module.": "as DataParallel and DDP save them: save model.module.state_dict()",
    "_orig_mod.": "as torch.compile saves them: save the model that was compiled",
    "model.": "as Lightning saves them: save the state dict of the model alone",
}
PICKLES = (b"PK\x03\x04", b"\x80")
HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where training scripts keep the weights in a checkpoint; the average first, as it is what they evaluate."""


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` in place from a safetensors file, as `fill` does.

    Raises:
        InputError: the file is missing, truncated, does not fit the model, or holds values that are not finite.
    """
    fill(model, read_tensors(path), path)


def fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Fill `model` in place with the `tensors` of `path`; only counters (num_batches_tracked) may be missing.

    Values of another precision are converted to the model's.

    Raises:
        InputError: they are those of another model, or not finite.
    """
    own: dict[str, Tensor] = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    missing = [n for n in own if n not in tensors and not n.endswith("num_batches_tracked")]
    foreign = [n for n in tensors if n not in own]
    if missing or foreign:
        raise InputError(f"{path} {_other_names(missing, foreign, own)}")
    wrong = [n for n, v in own.items() if n in tensors and tensors[n].shape != v.shape]
    if wrong:
        said = [f"{n} is {list(tensors[n].shape)}, the model has {list(own[n].shape)}" for n in wrong]
        raise InputError(f"{path}: {_few(said, '; ')}{_why(wrong, tensors, own)}")
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():  # a mask among the buffers may hold infinities
        if value.is_floating_point() and bool((~value.isfinite() if name in parameters else value.isnan()).any()):
            raise InputError(f"{path}: {name} holds values that are not finite")
    model.load_state_dict(tensors, strict=False)


def filled(build: Callable[..., nn.Module], head: Callable[[nn.Module], str], path: Path) -> nn.Module:
    """What `build` makes, with as many outputs (`num_classes=`) as the checkpoint at `path` has, filled from it.

    `head` names the tensor that has a row for each class.

    Raises:
        InputError: the file is missing or damaged, or of another model.
    """
    tensors = read_checkpoint(path)
    with untraced():
        model = build()
        name, own = head(model), model.state_dict()
        if name in tensors and name in own and tensors[name].shape[:1] != own[name].shape[:1]:
            model = build(num_classes=len(tensors[name]))
    fill(model, tensors, path)
    return model


def untraced() -> AbstractContextManager[Any]:
    """Inside, first weights, which are overwritten, are drawn without a trace on torch's global generator."""
    return torch.random.fork_rng(devices=[])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; InputError if it is missing, truncated or another kind of file."""
    try:
        return load_file(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"no weights file {path}") from error
    except (SafetensorError, OSError, ValueError) as error:
        if _is_pickle(path):
            raise InputError(
                f"{path} is a checkpoint of torch.save, not a safetensors file; write one with "
                "safetensors.torch.save_file(model.state_dict(), FILE)"
            ) from error
        raise InputError(f"{path} is not a whole safetensors file: {error}") from error


def read_checkpoint(path: Path) -> Mapping[str, Tensor]:
    """The weights in a safetensors file or a checkpoint of torch.save, without the prefixes that wrappers leave.

    Nothing but tensors and plain values is loaded from a checkpoint. Of several models in it the averaged one counts.

    Raises:
        InputError: the file is missing or damaged, or holds no weights or other things.
    """
    if path.suffix == ".safetensors" or not _is_pickle(path):
        return _unwrapped(read_tensors(path))
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # many scripts keep their arguments beside them
            held = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged or holds more than weights ({one_line(error, 120)}); "
            "save model.state_dict() alone, or as safetensors"
        ) from error
    tensors = _tensors_of(held)
    if not tensors:
        raise InputError(f"{path} holds no weights, at its top or under {', '.join(HOLDERS)}")
    return _unwrapped(tensors)


def _tensors_of(held: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, or of the first one that a checkpoint holds."""
    if not isinstance(held, Mapping):
        return {}
    inner = next((held[name] for name in HOLDERS if isinstance(held.get(name), Mapping)), held)
    return {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}


def _unwrapped(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Names without what DataParallel, torch.compile and averaging put before them."""
    found = {name: value for name, value in tensors.items() if name != "n_averaged"}
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _is_pickle(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4).startswith(PICKLES)
    except OSError:
        return False


def _other_names(missing: list[str], foreign: list[str], own: Mapping[str, Tensor]) -> str:
    """What is wrong with the names, and why that may be."""
    prefix = next((name[: -len(mine)] for name in foreign for mine in own if name.endswith(f".{mine}")), "")
    if prefix and all(f"{prefix}{name}" in foreign for name in missing):
        return f"has the model's tensors under names that begin with {prefix!r}, {WRAPPERS.get(prefix, 'strip it')}"
    if missing:
        said = f"has no tensor {_few([repr(n) for n in missing])}, which the model needs"
        return f"{said}, and has {_few([repr(n) for n in foreign])} (another model's?)" if foreign else said
    return f"holds {_few([repr(n) for n in foreign])}, which the model does not have"


def _why(wrong: list[str], tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """A guess at why shapes differ: other outputs of the last layer, or narrower everywhere."""
    owners = {n.rpartition(".")[0] for n in wrong}
    last = next((n.rpartition(".")[0] for n in reversed(list(own))), "")
    if owners == {last} and all(tensors[n].shape[1:] == own[n].shape[1:] for n in wrong):
        return " (another number of classes?)"
    if len(owners) > 1 and all(a <= b for n in wrong for a, b in zip(tensors[n].shape, own[n].shape, strict=False)):
        return " (the weights of a pruned model? autoprune.load builds it from its folder)"
    return ""


def _few(words: list[str], between: str = ", ") -> str:
    more = f" and {len(words) - MOST_NAMED} more" if len(words) > MOST_NAMED else ""
    return between.join(words[:MOST_NAMED]) + more
