"""Other people's pruners on ResNet-20, used as their own documentation says: FastNAS and Torch-Pruning.

FastNAS is that of NVIDIA's modelopt (not installed with autoprune: `pip install --no-deps --target SITE
nvidia-modelopt==0.47 nvidia-ml-py omegaconf "pulp<4" antlr4-python3-runtime==4.9.3 ninja`, SITE on PYTHONPATH). It
counts by torchprofile, in whose place torch's own counter stands here.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autoprune.database.batches import chunks, gather
from autoprune.losses.kl import kl
from autoprune.protocols import Batch, Task

BATCH = 64
DIVISOR = 4
"""FastNAS's steps of channels: by default 32, of which a layer of ResNet-20 has no more than two."""
STEP = 0.01
"""Of all channels, what Torch-Pruning takes away at a time until the budget holds."""


def macs(model: nn.Module, args: Any) -> int:
    """Multiply-accumulates of a forward pass: half of what torch's counter says."""
    given = tuple(args) if isinstance(args, tuple | list) else (args,)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*given)
    return int(counter.get_total_flops()) // 2


def fastnas(task: Task, at: float, checkpoint: Path) -> nn.Module:
    """ResNet-20 at a ratio of its MACs by modelopt's FastNAS; the score is the KL to the dense model.

    Its norms are calibrated on the calibration images, on which candidates are scored as well.
    """
    _count_by_torch()
    import modelopt.torch.prune as mtp

    model, batches = task.build().eval(), _batches(task)
    dense = [_outputs(task, model, b) for b in batches]
    score = partial(_faithful, task, batches, dense)
    example = task.example_inputs()[0][:1]
    config = {
        "data_loader": batches,
        "score_func": score,
        "checkpoint": str(checkpoint),
        "collect_func": lambda b: b[0],
    }
    space = mtp.fastnas.FastNASConfig()
    space["nn.Conv2d"]["*"]["channel_divisor"] = DIVISOR
    space["nn.BatchNorm2d"]["*"]["feature_divisor"] = DIVISOR
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruned, _ = mtp.prune(
            model,
            mode=[("fastnas", space)],
            constraints={"flops": f"{100 * at:g}%"},
            dummy_input=example,
            config=config,
        )
    found: nn.Module = pruned
    return found.eval()


def _count_by_torch() -> None:
    """What modelopt calls of torchprofile, by torch's own counter."""
    outer, inner, handlers = (types.ModuleType(f"torchprofile{name}") for name in ("", ".profile", ".handlers"))
    inner.profile_macs = macs  # type: ignore[attr-defined]
    inner.handlers = ()  # type: ignore[attr-defined]
    outer.profile = inner  # type: ignore[attr-defined]
    sys.modules |= {module.__name__: module for module in (outer, inner, handlers)}


def torch_pruning(task: Task, at: float) -> nn.Module:
    """ResNet-20 at a ratio of its MACs by Torch-Pruning's global pruner with group magnitudes.

    The inner widths of the blocks are pruned, which are all groups that autoprune has there. The rest is ignored: the
    shortcuts pad channels with zeros, and cut through them its graph gives layers that do not fit each other.
    """
    import torch_pruning as tp

    model, example = task.build().eval(), task.example_inputs()[0][:1]
    inner = [m for name, m in model.named_modules() if name.startswith("layer") and name.endswith("conv1")]
    outer = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in inner]
    wanted, steps = at * macs(model, example), round(1 / STEP)
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=1.0,
        max_pruning_ratio=0.9,
        iterative_steps=steps,
        global_pruning=True,
        ignored_layers=outer,
    )
    for _ in range(steps):
        if macs(model, example) <= wanted:
            break
        pruner.step()
    return model.eval()


def recalibrated(model: nn.Module, task: Task) -> nn.Module:
    """Batch norms with the statistics of the calibration images, as both libraries advise."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for batch in _batches(task):
            task.outputs(model, batch)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def _batches(task: Task) -> list[Batch]:
    return [part for whole in gather(task.split("calibration"), 3072) for part in chunks(whole, BATCH)]


def _outputs(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return task.outputs(model, batch)


def _faithful(task: Task, batches: Sequence[Batch], dense: Sequence[Tensor], model: nn.Module) -> float:
    losses = [kl(_outputs(task, model, b), d, classes=-1).mean() for b, d in zip(batches, dense, strict=True)]
    return -float(torch.stack(losses).mean())


OTHERS: dict[str, Callable[..., nn.Module]] = {"fastnas": fastnas, "torch_pruning": torch_pruning}
