"""The verb `apply`: points of a front as folders that stand alone, each written whole or not at all."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from autoprune import plugins
from autoprune.application.apply import Applied, applying, check_recovery, trusted_criterion
from autoprune.application.beside import losses_beside
from autoprune.application.card import card
from autoprune.application.checkpoints import Place
from autoprune.application.extras import TestSplit, write_extras
from autoprune.application.hugging_face import write_config
from autoprune.application.loader import (
    CARD,
    FACTS,
    POLICY,
    WEIGHTS,
    check_free,
    check_parent,
    origin_of,
    read_facts,
    remember,
    write_facts,
    write_model,
)
from autoprune.application.masks import MASKS
from autoprune.application.match import unlike
from autoprune.application.order import REQUEST, Order, own_front, request_of
from autoprune.application.repair import Manner, searched_settings
from autoprune.application.sources import Source, source_of_job, source_of_name
from autoprune.application.timed import latency_facts
from autoprune.application.transfer import KEY, SAME, Sibling, carried, sibling_of, within
from autoprune.application.zeros import zeros_in
from autoprune.deploy import check_model, misfits
from autoprune.errors import InputError, RunError, did_you_mean
from autoprune.evaluator.settings import Settings
from autoprune.exports import check_formats, check_inputs
from autoprune.files.job import Job
from autoprune.files.policy_file import load_front
from autoprune.files.whole import whole_folder
from autoprune.front import Front, Point
from autoprune.latency.runtime_here import check_threads
from autoprune.protocols import Step, finished, relayed
from autoprune.recovery import build_recovery
from autoprune.structure import Structure
from autoprune.tracing.fingerprint import weights_fingerprint
from autoprune.tracing.one_thread import one_thread

MOST_SAID = 3


@one_thread()
def apply_file(
    policy_path: Path, model: Job | str, at: str | Sequence[str], out: Path, order: Order | None = None
) -> dict[str, Any]:
    """`delivering` to its end."""
    return finished(delivering(policy_path, model, at, out, order))


def delivering(
    policy_path: Path, model: Job | str, at: str | Sequence[str], out: Path, order: Order | None = None
) -> Generator[Step, None, dict[str, Any]]:
    """`autoprune apply`: select, apply, score on the test split, time, save; returns apply.json, which it also writes.

    `model` is a job, whose task has the data, or what `source_of_name` takes. A single point goes to `out`; of several
    each has a folder in it, and {"points": {id: apply.json}} is returned. A folder that the same command has finished
    before is left as it is; a full recovery is kept beside its folder while it runs, and gone on with.

    Raises:
        InputError: whatever is wrong with the request, before anything is computed.
        RunError: a model fails its verification or an export, or the disk is full.
    """
    order, words = _resolved(order or Order(), model), [at] if isinstance(at, str) else list(at)
    if order.training.kind == "full":
        build_recovery(order.training.recovery, order.training.options)  # what it refuses is told before any cut
    (check_free if len(words) == 1 else check_parent)(out)
    front = load_front(policy_path)
    points = _selected(front, words)
    if order.deploy is not None:
        _check_container([] if order.transfer else points, order.deploy)
    folders = {p.id: out if len(words) == 1 else out / _as_name(p.id) for p in points}
    for folder in folders.values():
        check_free(folder)
    asked = {p.id: request_of(policy_path, model, p.id, order) for p in points}
    done = {i: found for i, folder in folders.items() if (found := _finished(folder, asked[i])) is not None}
    for kept in done:
        warnings.warn(f"{folders[kept]} was finished by the same command before, and is left as it is", stacklevel=2)
    failed = list[str]()
    if to_do := [p for p in points if p.id not in done]:
        source = _checked(_source(model, front, order.weights), order)
        for placed in _placed(to_do, _costs(front, words), source, order, own_front(model)):
            made, folder = placed.point.id, folders[placed.point.id]
            steps = _delivered(placed, source, order, front.measured_on, policy_path, folder, asked[made])
            done[made], said = yield from relayed(steps, _prefixed(f"{made}: " if len(points) > 1 else ""))
            failed += [f"{line}; {folder} holds all else" for line in said]
    if failed:
        raise RunError("; ".join(failed))
    return done[points[0].id] if len(words) == 1 else {"points": {p.id: done[p.id] for p in points}}


def _resolved(order: Order, model: Job | str) -> Order:
    """With known formats, and the job's recovery where none is named; a job's options are for its own one."""
    formats = check_formats([*order.export, "onnx"] if order.int8 else order.export)
    training = order.training
    if isinstance(model, Job):
        own = model.recovery.schedule
        options = training.options or (model.options("recovery") if training.schedule in (None, own) else {})
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


@dataclass(frozen=True)
class Placed:
    """A point for the model that it goes onto; of a transfer the sibling that it was carried over to, and what is said.

    `said` is what apply.json says where nothing had to be carried over.
    """

    point: Point
    sibling: Sibling | None = None
    said: Mapping[str, Any] = field(default_factory=dict)


def _placed(
    points: Sequence[Point], costs: Mapping[str, str], source: Source, order: Order, own: Path | None
) -> list[Placed]:
    """The points as they are, or, where they are to be transferred, carried over to the source's model."""
    if not order.transfer:
        return [Placed(p) for p in points]
    if all(not unlike(p, source.model) for p in points):
        warnings.warn(SAME, stacklevel=3)
        found = [Placed(p, said={KEY: {"approximate": False, "said": SAME}}) for p in points]
    else:
        sibling = sibling_of(points[0].base, source.model, source.inputs, _named(source), own)
        inner = within(points[0].base, sibling, order.deploy)
        found = [Placed(carried(p, sibling, costs[p.id], order.deploy), inner) for p in points]
    if order.deploy is not None:
        _check_container([placed.point for placed in found], order.deploy)
    return found


def _named(source: Source) -> str:
    """What a policy file calls the model: as the user does, but a folder by its class."""
    args = source.told["task"]["args"] if source.told.get("task") else {}
    said = source.told.get("model") or args.get("model")
    return type(source.model).__name__ if said is None or source.folder is not None else str(said)


def _costs(front: Front, words: Sequence[str]) -> dict[str, str]:
    """The cost by which each point was chosen, else that in which the front ascends."""
    named = {front.select(word).id: re.match(r"\s*([\w.:]+)\s*=", word) for word in words}
    return {i: front.cost if m is None or m[1] == "drop" else m[1] for i, m in named.items()}


def _source(model: Job | str, front: Front, weights: Path | None) -> Source:
    return source_of_job(model, weights) if isinstance(model, Job) else source_of_name(model, front.base, weights)


def _checked(source: Source, order: Order) -> Source:
    """InputError where the order wants data and there are none, or its container holds no such model."""
    if source.task is None and order.training.kind == "full":
        raise InputError("--finetune full trains on data, and --model alone has none: give --task with a job")
    if source.task is None and order.int8:
        raise InputError("--int8 finds the ranges of activations on data, and --model alone has none: give --task")
    check_recovery(order.training, source.model, source.task)
    check_threads(source.threads)
    if order.export:
        check_inputs(source.inputs)
    check_model(source.model, order.deploy)
    return source


Told = tuple[dict[str, Any], list[str]]


def _prefixed(prefix: str) -> Callable[[Step], Step]:
    """What names the steps of one of several points."""
    return lambda step: replace(step, stage=f"{prefix}{step.stage}")


def _as_name(point: str) -> str:
    """A point's id as the name of a folder; InputError where a file gives an id that is none."""
    if not re.fullmatch(r"\w[\w.-]*", point):
        raise InputError(f"the policy file calls a point {point!r}, which names no folder; apply it alone, by --at")
    return point


def _delivered(
    placed: Placed,
    source: Source,
    order: Order,
    measured_on: Mapping[str, Any],
    policy_path: Path,
    out: Path,
    request: str,
) -> Generator[Step, None, Told]:
    """One point into its folder: apply.json, and what could not be written of all that was asked for."""
    point, task, place = placed.point, source.task, Place.beside(out, f"{request} {weights_fingerprint(source.model)}")
    manner = Manner(
        searched_settings(point, source.settings or Settings()),
        trusted_criterion(point, (order.criterion, source.criterion)),
        order.training,
        place,
        policy_path.parent / "database",
    )
    applied = yield from applying(point, source.model, source.inputs, task, manner)
    yield Step("test split and latency")
    facts = {**applied.facts, **source.told, **placed.said, **_figures(source, applied, order, measured_on)}
    if placed.sibling is not None and task is not None:
        beside = losses_beside(point, placed.sibling, source.model, task, manner.settings, manner.criterion)
        facts[KEY] = {**facts[KEY], "losses": beside}
    remember(applied.model, applied.kept, facts, str(policy_path))
    yield Step("exports")
    with whole_folder(out) as draft:
        write_model(applied.model, origin_of(applied.model).policy, draft)
        write_config(applied.model, draft, source.folder)
        more, failed = write_extras(point, source, applied.model, order, draft)
        facts |= more | ({"failed": failed} if failed else {REQUEST: request})
        facts["bytes"] = {"dense": _bytes(source), "pruned": sum(path.stat().st_size for path in _stored(draft))}
        facts |= zeros_in(applied.model, applied.kept, draft / WEIGHTS)
        others = sorted(path.name for path in draft.iterdir() if path.name not in (WEIGHTS, POLICY))
        facts["files"] = [str(out / name) for name in (WEIGHTS, POLICY, *others, FACTS, CARD)]
        write_facts(facts, draft)
        (draft / CARD).write_text(card(facts, applied.kept), encoding="utf-8")
    if not failed:  # else the same command tries again, and need not train again for that
        place.clear()
    return facts, failed


def _figures(source: Source, applied: Applied, order: Order, measured_on: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of both models on the test split, where there is one, and their latency."""
    found: dict[str, Any] = {}
    task, both = source.task, {"dense": source.model, "pruned": applied.model}
    if task is not None:
        found["test"] = {name: dict(task.metrics(model, TestSplit(task))) for name, model in both.items()}
    exported = "onnxruntime" if "onnx" in order.export else "eager"
    runtime = exported if source.runtime == "auto" else source.runtime
    clocked = (runtime, source.batch_size, source.threads)
    timed = latency_facts(source.model, applied.model, source.inputs, *clocked)
    if isinstance(timed, str):
        return {**found, "latency": None, "untimed": timed}
    return {**found, "latency": timed | _parts(applied.kept, measured_on, timed)}


def _parts(point: Point, measured_on: Mapping[str, Any], timed: Mapping[str, Any]) -> dict[str, Any]:
    """What the search's latency table says that the time is made of, where it was measured in the same way."""
    dense, pruned = measured_on.get("latency"), point.costs.get("latency")
    alike = all(measured_on.get(key) == timed[key] for key in ("runtime", "threads", "batch_size"))
    alike = alike and measured_on.get("timed_on") == timed["device"]
    if not alike or dense is None or pruned is None or not set(dense) <= set(pruned):
        return {}
    return {"parts": {"dense": dict(dense), "pruned": {name: pruned[name] for name in dense}}}


def _stored(folder: Path) -> list[Path]:
    """The files that hold the weights: those of the values, and of the masks where there are any."""
    return [path for name in (WEIGHTS, MASKS) if (path := folder / name).exists()]


def _bytes(source: Source) -> int:
    return sum(t.numel() * t.element_size() for t in source.model.state_dict().values() if isinstance(t, torch.Tensor))


def _finished(folder: Path, request: str) -> dict[str, Any] | None:
    """apply.json of a folder that this very command has written."""
    found = read_facts(folder)
    whole = all((folder / Path(str(name)).name).exists() for name in found.get("files") or ())
    return json.loads(json.dumps(dict(found))) if found.get(REQUEST) == request and whole else None
