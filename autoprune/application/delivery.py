"""The verb `apply`: points of a front as folders that stand alone, each written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoprune import plugins
from autoprune.application.apply import Applied, applied_point, trusted_criterion
from autoprune.application.card import card
from autoprune.application.hugging_face import read_back, write_config
from autoprune.application.int8 import OnnxModel, Quantised, quantise
from autoprune.application.loader import (
    CARD,
    FACTS,
    POLICY,
    WEIGHTS,
    check_free,
    origin_of,
    read_facts,
    remember,
    write_facts,
    write_model,
)
from autoprune.application.repair import searched_settings
from autoprune.application.sources import Source, source_of_job, source_of_name
from autoprune.application.timed import file_latency, latency_facts
from autoprune.application.training import Training
from autoprune.database.batches import prepare
from autoprune.deploy import misfits
from autoprune.errors import InputError, did_you_mean, root_line
from autoprune.evaluator.settings import Settings
from autoprune.exports import check_formats, check_inputs
from autoprune.exports import export as export_model
from autoprune.files.job import Job
from autoprune.files.policy_file import load_front
from autoprune.files.whole import whole_folder
from autoprune.front import Front, Point
from autoprune.protocols import Batch, Task
from autoprune.recovery import build_recovery
from autoprune.structure import Structure
from autoprune.tracing.one_thread import one_thread

ONNX = "model.onnx"
MOST_SAID = 3
REQUEST = "request"
"""The key of apply.json that says which command made the folder."""


@dataclass(frozen=True)
class Order:
    """What is wanted of every point: other weights, a training, a criterion of the user's own, exports.

    `int8` quantises the ONNX export, which it implies; `deploy` names a container that every point must fit.
    """

    weights: Path | None = None
    training: Training = field(default_factory=Training)
    criterion: str | None = None
    export: tuple[str, ...] = ()
    int8: bool = False
    deploy: str | None = None


@one_thread()
def apply_file(
    policy_path: Path, model: Job | str, at: str | Sequence[str], out: Path, order: Order | None = None
) -> dict[str, Any]:
    """`autoprune apply`: select, apply, score on the test split, time, save; returns apply.json, which it also writes.

    `model` is a job, whose task has the data, or what `source_of_name` takes. A single point goes to `out`; of several
    each has a folder in it, and {"points": {id: apply.json}} is returned. A folder that the same command has finished
    before is left as it is.

    Raises:
        InputError: whatever is wrong with the request, before anything is computed.
        RunError: a model fails its verification or an export, or the disk is full.
    """
    order = _resolved(order or Order(), model)
    if order.training.kind == "full":
        build_recovery(order.training.recovery, order.training.options)  # what it refuses is told before any cut
    words = [at] if isinstance(at, str) else list(at)
    if len(words) == 1:
        check_free(out)
    front = load_front(policy_path)
    points = _selected(front, words)
    if order.deploy is not None:
        _check_container(points, order.deploy)
    folders = {p.id: out if len(points) == 1 else out / p.id for p in points}
    for folder in folders.values():
        check_free(folder)
    asked = {p.id: _request(policy_path, model, p, order) for p in points}
    done = {i: found for i, folder in folders.items() if (found := _finished(folder, asked[i])) is not None}
    source: Source | None = None
    for point in (p for p in points if p.id not in done):
        if source is None:
            source = _source(model, front, order.weights)
            _check(source, order)
        done[point.id] = _delivered(point, source, order, policy_path, folders[point.id], asked[point.id])
    return done[points[0].id] if len(points) == 1 else {"points": {p.id: done[p.id] for p in points}}


def _resolved(order: Order, model: Job | str) -> Order:
    """With known formats, and the job's recovery where none is named; a job's options are for its own one."""
    formats = check_formats([*order.export, "onnx"] if order.int8 else order.export)
    training = order.training
    if isinstance(model, Job):
        own = model.recovery.schedule
        options = model.options("recovery") if training.schedule in (None, own) else {}
        training = replace(training, schedule=training.schedule or own, options=options)
    return replace(order, export=formats, training=training)


def _check_container(points: Sequence[Point], deploy: str) -> None:
    """InputError where a point does not fit its container."""
    if ":" not in deploy and deploy not in (known := plugins.names("deploy")):
        raise InputError(f"--deploy: unknown container {deploy!r}; {did_you_mean(deploy, known)}")
    for point in points:
        if said := misfits(Structure(point.base.groups, ()), point.policy, deploy):
            more = f", and {len(said) - MOST_SAID} more" if len(said) > MOST_SAID else ""
            lines = "; ".join(said[:MOST_SAID])
            raise InputError(f"{deploy} cannot hold point {point.id}: {lines}{more}; search with deploy: {deploy}")


def _selected(front: Front, words: Sequence[str]) -> list[Point]:
    """The points that `words` name, each once."""
    if not words:
        raise InputError("say which point: --at macs=0.5, drop=0.01, knee or an id")
    return list({p.id: p for p in (front.select(word) for word in words)}.values())


def _source(model: Job | str, front: Front, weights: Path | None) -> Source:
    return source_of_job(model, weights) if isinstance(model, Job) else source_of_name(model, front.base, weights)


def _check(source: Source, order: Order) -> None:
    if source.task is None and order.training.kind == "full":
        raise InputError("--finetune full trains on data, and --model alone has none: give --task with a job")
    if source.task is None and order.int8:
        raise InputError("--int8 finds the ranges of activations on data, and --model alone has none: give --task")
    if order.export:
        check_inputs(source.inputs)


def _delivered(
    point: Point, source: Source, order: Order, policy_path: Path, out: Path, request: str
) -> dict[str, Any]:
    """One point into its folder."""
    applied = applied_point(
        point,
        source.model,
        source.inputs,
        source.task,
        searched_settings(point, source.settings or Settings()),
        trusted_criterion(point, (order.criterion, source.criterion)),
        order.training,
        policy_path.parent / "database",
    )
    facts = {**applied.facts, **source.told, **_figures(source, applied, order), REQUEST: request}
    remember(applied.model, applied.kept, facts, str(policy_path))
    with whole_folder(out) as draft:
        write_model(applied.model, origin_of(applied.model).policy, draft)
        configured = write_config(applied.model, draft, source.folder)
        exported = export_model(applied.model, source.inputs, order.export, draft) if order.export else []
        if order.int8 and source.task is not None:
            quantised = quantise(draft / ONNX, applied.model, source.task)
            exported.append(quantised.path)
            facts["int8"] = _int8_figures(quantised, draft / ONNX, source, applied.model)
        contained = _contained(point, source, applied.model, order.deploy, draft)
        names = [WEIGHTS, POLICY, *configured, *(path.name for path in exported), *contained, FACTS, CARD]
        facts["bytes"] = {"dense": _bytes(source), "pruned": (draft / WEIGHTS).stat().st_size}
        facts["files"] = [str(out / name) for name in names]
        write_facts(facts, draft)
        (draft / CARD).write_text(card(facts, applied.kept), encoding="utf-8")
    return facts


def _contained(point: Point, source: Source, model: nn.Module, deploy: str | None, draft: Path) -> list[str]:
    """The folder of a container that is written, read back and compared; none where there is nothing to write."""
    container: Any = None if deploy is None else plugins.load("deploy", deploy)()
    if deploy is None or not hasattr(container, "write"):
        return []
    folder = draft / deploy.replace(":", ".")
    container.write(model, Structure(point.base.groups, ()), point.policy, folder)
    read_back(folder, model, source.inputs)
    return [folder.name]


def _figures(source: Source, applied: Applied, order: Order) -> dict[str, Any]:
    """Scores of both models on the test split, where there is one, and their latency."""
    found: dict[str, Any] = {}
    task, both = source.task, {"dense": source.model, "pruned": applied.model}
    if task is not None:
        found["test"] = {name: dict(task.metrics(model, _TestSplit(task))) for name, model in both.items()}
    exported = "onnxruntime" if "onnx" in order.export else "eager"
    runtime = exported if source.runtime == "auto" else source.runtime
    found["latency"] = latency_facts(source.model, applied.model, source.inputs, runtime, source.batch_size)
    return found


def _int8_figures(quantised: Quantised, exported: Path, source: Source, model: nn.Module) -> dict[str, Any]:
    """Scores of the 8-bit file on the test split, its size, and its latency over that of the float file."""
    assert source.task is not None
    timed = file_latency(exported, quantised.path, model, source.inputs, source.batch_size)
    if timed["ratio"] > 1.0:
        warnings.warn(f"{quantised.path.name} takes {timed['ratio']:.2f} of the float file's time here", stacklevel=2)
    found: dict[str, Any] = {"way": quantised.way, "bytes": quantised.path.stat().st_size, "latency": timed}
    try:
        scores = dict(source.task.metrics(OnnxModel(quantised.path, model), _TestSplit(source.task)))
    except Exception as error:  # a task may want more of a model than its outputs
        return {**found, "test": None, "unscored": root_line(error, 160)}
    return {**found, "test": scores}


def _bytes(source: Source) -> int:
    return sum(t.numel() * t.element_size() for t in source.model.state_dict().values() if isinstance(t, torch.Tensor))


def _request(policy_path: Path, model: Job | str, point: Point, order: Order) -> str:
    """What decides the contents of a folder, as far as the command tells."""
    weights = order.weights
    seen = None if weights is None or not weights.exists() else (weights.stat().st_size, weights.stat().st_mtime_ns)
    said = model if isinstance(model, str) else model.sha256
    told = (policy_path.read_bytes(), said, point.id, order, seen)
    return f"sha256:{hashlib.sha256(repr(told).encode()).hexdigest()}"


def _finished(folder: Path, request: str) -> dict[str, Any] | None:
    """apply.json of a folder that this very command has written."""
    found = read_facts(folder)
    whole = all((folder / Path(str(name)).name).exists() for name in found.get("files") or ())
    return json.loads(json.dumps(dict(found))) if found.get(REQUEST) == request and whole else None


@dataclass(frozen=True)
class _TestSplit:
    """The test split of a task at every pass anew: as a whole it may not fit into memory."""

    task: Task

    def __iter__(self) -> Iterator[Batch]:
        return (prepare(batch, torch.device("cpu")) for batch in self.task.split("test"))
