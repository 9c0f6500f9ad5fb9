"""Safetensors weights into a model, with errors that name the first tensor that does not fit."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autoprune.errors import InputError


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` in place from a safetensors file; only counters (num_batches_tracked) may be missing.

    Raises:
        InputError: the file is missing, truncated, or does not fit the model.
    """
    tensors = read_tensors(path)
    own = model.state_dict()
    for name, value in own.items():
        if name.endswith("num_batches_tracked") and name not in tensors:
            continue
        if name not in tensors:
            raise InputError(f"{path} has no tensor {name!r}, which the model needs")
        if tensors[name].shape != value.shape:
            raise InputError(f"{path}: {name} is {list(tensors[name].shape)}, the model has {list(value.shape)}")
    foreign = [name for name in tensors if name not in own]
    if foreign:
        raise InputError(f"{path} holds a tensor {foreign[0]!r} that the model does not have")
    model.load_state_dict(tensors, strict=False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; InputError if it is missing or truncated."""
    try:
        return load_file(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"no weights file {path}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from error
