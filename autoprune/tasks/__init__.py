"""Tasks, one file each: model, data, metric. `autoprune.tasks:resnet20` (32, 44, 56) is a CIFAR ResNet for a job."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoprune.tasks._cifar_resnet import resnet20 as resnet20
    from autoprune.tasks._cifar_resnet import resnet32 as resnet32
    from autoprune.tasks._cifar_resnet import resnet44 as resnet44
    from autoprune.tasks._cifar_resnet import resnet56 as resnet56

__all__ = ["resnet20", "resnet32", "resnet44", "resnet56"]


def __getattr__(name: str) -> Any:
    """The factories, imported when they are used: listing this folder must stay cheap."""
    if name not in __all__:
        raise AttributeError(f"module 'autoprune.tasks' has no attribute {name!r}")
    return getattr(importlib.import_module("autoprune.tasks._cifar_resnet"), name)
