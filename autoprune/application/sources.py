"""What `apply` prunes: a dense model with inputs to call it by, and its task where there are data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune import plugins
from autoprune.criteria import Named
from autoprune.errors import AutopruneError, InputError, one_line
from autoprune.evaluator.settings import Settings
from autoprune.files.job import Job, checked_task
from autoprune.front import Base
from autoprune.protocols import Task
from autoprune.run.prepare import settings_of
from autoprune.tasks._hugging_face import ModelFolder
from autoprune.tasks._weights import fill, read_checkpoint, untraced
from autoprune.tasks.timm import network

TIMM = "timm:"
WAYS = "a Hugging Face folder, timm:NAME, or module:factory"


@dataclass(frozen=True)
class Source:
    """A dense model with its weights, its example inputs, and how apply.json names it.

    Without a `task` there are no data: what is applied is cut by shapes alone. `runtime`, `batch_size` and `threads`
    are what its latency is measured with, `criterion` is what the job names,
    `folder` the Hugging Face one that the model comes from.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    told: Mapping[str, Any]
    task: Task | None = None
    settings: Settings | None = None
    runtime: str = "auto"
    batch_size: int = 1
    criterion: Named | None = None
    folder: Path | None = None
    threads: int = 1


def source_of_job(job: Job, weights: Path | None = None) -> Source:
    """The model and the data of a job's task, with other weights where a file is named.

    Raises:
        InputError: what the task refuses, or weights that do not fit.
    """
    task = job.build_task()
    model = _weighted(task.build(), weights)
    told, clocked = {"task": job.plain()["task"]}, job.latency
    named, folder = job.criterion_named, told["task"].get("args", {}).get("model")
    origin = Path(folder) if isinstance(folder, str) and Path(folder).is_dir() else None
    given = (model, task.example_inputs(), told, task, settings_of(job))
    return Source(*given, clocked.runtime, clocked.batch_size, named, origin, clocked.threads)


def source_of_name(name: str, base: Base, weights: Path | None = None) -> Source:
    """The model that `name` says: a Hugging Face folder, "timm:NAME", or a "module:factory" of the user's own.

    A factory returns a model, or a Task, which has data. Otherwise inputs are drawn as `base` describes its own.

    Raises:
        InputError: there is no such model, it is none, or the weights do not fit it.
    """
    made = _made(name, base, weights)
    told = {"task": None, "model": name}
    if hasattr(made, "build") and not isinstance(made, nn.Module):
        made = checked_task(made, f"--model {name} returned")
        return Source(_weighted(made.build(), weights), made.example_inputs(), told, made, Settings())
    if not isinstance(made, nn.Module):
        raise InputError(
            f"--model {name}: the factory returned a {type(made).__name__}, not a torch.nn.Module or a Task"
        )
    made.eval()
    return Source(made, drawn_inputs(base.inputs, made), told, folder=Path(name) if Path(name).is_dir() else None)


def drawn_inputs(described: Sequence[Mapping[str, Any]], model: nn.Module, seed: int = 0) -> tuple[Any, ...]:
    """Inputs of the described shapes and types: noise, whole masks, and numbers of tokens that the model has.

    Raises:
        InputError: the description is none of tensors.
    """
    draws = torch.Generator().manual_seed(seed)
    tokens = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 2)  # words come first
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = [(str(spec.get("name", "")), _drawn(spec, tokens, draws).to(device)) for spec in described]
    if not found:
        raise InputError("the policy file does not say what its model is called with; give --task with a job")
    if all(name for name, _ in found):
        return (dict(found),)
    return tuple(tensor for _, tensor in found)


def _made(name: str, base: Base, weights: Path | None) -> Any:
    if Path(name).is_dir():
        pooled = any("pooler" in tensor for tensor in base.shapes)
        return _weighted(ModelFolder.open(Path(name), "--model").of_class(base.model, pooled), weights)
    if name.startswith(TIMM):
        try:
            return network(name.removeprefix(TIMM), weights)[1]
        except InputError as error:
            raise InputError(str(error).replace("task.args.weights", "--weights")) from error
    if ":" in name:
        return _from_factory(name, weights)
    raise InputError(f"--model {name}: no such folder; it is {WAYS}")


def _from_factory(name: str, weights: Path | None) -> Any:
    factory = plugins.load_object(name)
    if not callable(factory):
        raise InputError(f"--model {name} is a {type(factory).__name__}; it must be a function that returns the model")
    try:
        with untraced():
            made = factory()
    except AutopruneError:
        raise
    except Exception as error:  # a user's code may fail in any way
        raise InputError(f"--model {name} fails: {one_line(error)}") from error
    return _weighted(made, weights) if isinstance(made, nn.Module) else made


def _weighted(model: nn.Module, weights: Path | None) -> nn.Module:
    if weights is not None:
        fill(model, read_checkpoint(weights), weights)
    return model


def _drawn(spec: Mapping[str, Any], tokens: int, draws: torch.Generator) -> Tensor:
    dtype = getattr(torch, str(spec.get("dtype")), None)
    shape, name = spec.get("shape"), str(spec.get("name", ""))
    sizes = list(shape) if isinstance(shape, list | tuple) else [0]
    if not isinstance(dtype, torch.dtype) or not all(type(n) is int and n > 0 for n in sizes):
        raise InputError(f"the policy file describes an input as {dict(spec)}, which is no tensor")
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=draws, dtype=dtype)
    if "mask" in name or dtype == torch.bool:
        return torch.ones(sizes, dtype=dtype)
    most = 1 if "type" in name or "position" in name else tokens
    return torch.randint(0, most, sizes, generator=draws).to(dtype)
