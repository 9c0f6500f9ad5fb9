"""Weights that a task trains once and keeps: where they lie, and how they are written."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from autoprune.files.whole import whole


def cache_folder() -> Path:
    """Where trained weights are kept: AUTOPRUNE_CACHE, else autoprune/ in the user's cache folder."""
    if own := os.environ.get("AUTOPRUNE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoprune"


def keep(model: nn.Module, path: Path) -> None:
    """Write the weights so that another process sees all of the file or none of it."""
    with whole(path) as draft:
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, draft)
