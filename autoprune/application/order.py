"""What a user orders of `apply` beside the points, and what tells that a folder is just that."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from autoprune import plugins
from autoprune.application.training import Training
from autoprune.database.batches import prepare
from autoprune.errors import InputError
from autoprune.files.job import Job
from autoprune.protocols import Task
from autoprune.tracing.copies import quiet_random_state
from autoprune.version import __version__

CODE = re.compile(r"[\w.]+:[\w.]+")
"""A user's function or class, as jobs name it."""
REQUEST = "request"
"""The key of apply.json that says which order made the folder."""


@dataclass(frozen=True)
class Order:
    """What is wanted of every point: other weights, a training, a criterion of the user's own, exports.

    `int8` quantises the ONNX export, which it implies; `deploy` names a container that every point must fit;
    `transfer` carries points over to a model of another structure.
    """

    weights: Path | None = None
    training: Training = field(default_factory=Training)
    criterion: str | None = None
    export: tuple[str, ...] = ()
    int8: bool = False
    deploy: str | None = None
    transfer: bool = field(default=False, repr=False)  # so that orders of before are still the same ones


def own_front(model: Job | str) -> Path | None:
    """Where a search of the job leaves its front, unless it is told another folder."""
    return Path("runs") / model.name / "policy.json" if isinstance(model, Job) else None


def request_of(policy_path: Path, model: Job | str, point: str, order: Order) -> str:
    """What decides the contents of a folder, as far as the command and the files that it names tell."""
    said: tuple[Any, ...] = (model,) if isinstance(model, str) else (model.sha256, model.plain()["task"])
    own = [name for name in (order.criterion, order.training.schedule, *_named_code(order)) if name and ":" in name]
    if isinstance(model, str) and ":" in model and not model.startswith("timm:"):
        own.append(model)
    sources = [plugins.source_digest(plugins.load_object(name)) for name in own]
    for value in _values(model.plain()["task"]) if isinstance(model, Job) else ():
        if isinstance(value, str) and CODE.fullmatch(value):
            with suppress(InputError):  # not every word with a colon is code
                sources.append(plugins.source_digest(plugins.load_object(value)))
    named = _values([*said, order.weights, dict(order.training.options)])
    files = sorted((str(value), _stamp(Path(value))) for value in named if _is_there(value))
    told: tuple[Any, ...] = (__version__, policy_path.read_bytes(), said, point, order, sources, files)
    if order.transfer:
        beside = own_front(model)
        told = (*told, "transfer", None if beside is None else _stamp(beside))
    return f"sha256:{hashlib.sha256(repr(told).encode()).hexdigest()}"


def _named_code(order: Order) -> list[str]:
    """What a recovery's options name of a user's own code."""
    options = order.training.options
    return [str(options[key]) for key in ("optimizer", "scheduler", "loss") if options.get(key)]


def _values(held: Any) -> Iterator[str | Path]:
    """All words and paths in a tree of plain values."""
    if isinstance(held, str | Path):
        yield held
    elif isinstance(held, dict):
        yield from _values(list(held.values()))
    elif isinstance(held, list | tuple):
        for value in held:
            yield from _values(value)


def _is_there(value: str | Path) -> bool:
    try:
        return (Path(value).is_absolute() and Path(value).exists()) or isinstance(value, Path) or Path(value).is_dir()
    except OSError:  # a word that is too long for a name
        return False


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Size and time of a file, or of all that lie in a folder."""
    inside = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    return [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in inside]


def task_digest(task: Task) -> str:
    """Identifies a task that came from Python: its code, and its first samples to measure and to train on.

    A train split that draws by a generator of its own is another one each time.
    """
    told = [plugins.source_digest(type(task))]
    for split in ("calibration", "train"):
        with quiet_random_state(0):
            first = next(iter(task.split(split)))
        for leaf in tree_leaves(prepare(first, torch.device("cpu"))):
            whole = leaf.contiguous().view(torch.uint8).numpy().tobytes() if isinstance(leaf, torch.Tensor) else b""
            told.append(hashlib.sha256(whole or repr(leaf).encode()).hexdigest())
    return hashlib.sha256(repr(told).encode()).hexdigest()
