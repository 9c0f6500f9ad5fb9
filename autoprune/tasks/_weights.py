"""Safetensors weights into a model, with errors that name the tensors that do not fit and guess why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autoprune.errors import InputError

MOST_NAMED = 3
WRAPPERS = {
    "module.": "as DataParallel and DDP save them: save model.module.state_dict()",
    "_orig_mod.": "as torch.compile saves them: save the model that was compiled",
    "model.": "as Lightning saves them: save the state dict of the model alone",
}
PICKLES = (b"PK\x03\x04", b"\x80")


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` in place from a safetensors file; only counters (num_batches_tracked) may be missing.

    Values of another precision are converted to the model's.

    Raises:
        InputError: the file is missing, truncated, does not fit the model, or holds values that are not finite.
    """
    tensors = read_tensors(path)
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
        return f"has no tensor {_few([repr(n) for n in missing])}, which the model needs"
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
