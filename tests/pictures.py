"""Folders of small images for tests, and timm or torchvision where their compiled part is missing or they are."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


def pillow() -> Any:
    """`PIL.Image`; it comes with the extra `dev`."""
    return pytest.importorskip("PIL.Image", reason="needs Pillow (pip install 'autoprune[dev]')")


def write_images(root: Path, counts: Mapping[str, int], seed: int = 0, size: int = 12) -> Path:
    """A folder a class of PNG files, each image its own random noise."""
    rng = np.random.default_rng(seed)
    for name, n in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            pillow().fromarray(pixels).save(root / name / f"{i:03}.png")
    return root


def library(name: str) -> Any:
    """timm or torchvision, behind stubs of the compiled operators where those do not load; skips where it is absent."""
    for needed in {"torchvision", name}:
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed} (pip install 'autoprune[timm]')")
    stub_operators()
    return importlib.import_module(name)


@functools.cache
def stub_operators() -> Any:
    """Define torchvision's operators by name where the torch here cannot load them: classifiers call none of them."""
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    try:
        for compiled in folder.glob("_C*.so"):
            torch.ops.load_library(compiled)
    except OSError:
        stubs = torch.library.Library("torchvision", "FRAGMENT")
        for operator in sorted(set(re.findall(r"torchvision::(\w+)", (folder / "_meta_registrations.py").read_text()))):
            stubs.define(f"{operator}(Tensor a) -> Tensor")
        return stubs
    return None
