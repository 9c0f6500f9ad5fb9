"""The verb `apply`: a point of a front onto fresh weights, repaired as in the search, verified, saved."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune import plugins
from autoprune.application.loader import (
    FACTS,
    POLICY,
    WEIGHTS,
    check_free,
    origin_of,
    remember,
    write_facts,
    write_model,
)
from autoprune.application.loader import load_applied as load_applied
from autoprune.application.match import matching
from autoprune.application.repair import repaired, searched_settings
from autoprune.application.training import Training, promised
from autoprune.criteria import Named, build_criterion
from autoprune.database.batches import prepare
from autoprune.errors import InputError
from autoprune.evaluator.settings import Settings
from autoprune.exports import check_formats, check_inputs
from autoprune.exports import export as export_model
from autoprune.files.job import Job, checked_task
from autoprune.files.policy_file import load_front
from autoprune.files.whole import whole_folder
from autoprune.front import Point
from autoprune.protocols import Batch, Criterion, Task
from autoprune.recovery import build_recovery
from autoprune.run.prepare import settings_of
from autoprune.structure import Structure
from autoprune.tasks._weights import load_weights
from autoprune.tracing.copies import check_module, copied
from autoprune.tracing.fingerprint import weights_fingerprint
from autoprune.tracing.one_thread import one_thread
from autoprune.tracing.slim import slim
from autoprune.tracing.verify import verify


def apply(
    point: Point,
    model: nn.Module,
    example_inputs: tuple[Tensor, ...],
    *,
    task: Task | None = None,
    settings: Settings | None = None,
    finetune: str = "proxy",
    finetune_epochs: float | None = None,
    criterion: Named | None = None,
) -> nn.Module:
    """A smaller, plain copy of `model`, pruned as `point` says; the lent model is untouched.

    With the weights of the search the kept atoms are replayed, with others they are ranked anew by the point's
    criterion. With a `task` the pruned model is repaired as in the search (compensation, batch norm, refit) on its
    calibration data and trained as `finetune` says: `proxy` repeats what trained the point in the search, and nothing
    where nothing did, so that the model is what the front promises; `none` repairs only; `full` is the recovery, for
    `finetune_epochs`, which imply it. Without a task it is sliced only. `settings` are by default those of the search
    as far as the point knows them. A criterion of your own that the point names must be named again, as `criterion`:
    a file is data, and nothing is imported because of it.

    Raises:
        InputError: the model has another structure (says where), or the policy was applied to it before.
        RunError: the pruned model fails its verification.
    """
    if not isinstance(point, Point):
        raise InputError(f"point must be one of a front, as front.select(macs=0.5) gives, not a {type(point).__name__}")
    check_module(model)
    if task is not None:
        checked_task(task, "task is")
    # the default word gives way to epochs, which cannot be told from one that was said
    training = Training.of(None if finetune == "proxy" else finetune, finetune_epochs)
    applied = _applied(
        point,
        model,
        example_inputs,
        task,
        settings or _searched(point, task),
        trusted_criterion(point, () if criterion is None else (criterion,)),
        training,
    )
    facts = {**applied.facts, "task": point.base.task or None}
    remember(applied.model, applied.kept, facts, f"point {point.id}")
    return applied.model


def _searched(point: Point, task: Task | None) -> Settings:
    """The settings of the search; InputError where a repair needs a loss that is the user's own."""
    settings, loss = searched_settings(point, Settings()), str(point.base.space.get("loss", ""))
    if task is not None and ":" in loss:
        raise InputError(
            f"the point was found with the loss {loss!r}, which is none of autoprune's own; a file is data, so nothing "
            f"is imported for it: give settings=searched_settings(point, Settings(loss={loss!r})), from "
            "autoprune.application.repair and autoprune.evaluator.settings"
        )
    return settings


@one_thread()
def apply_file(
    policy_path: Path,
    job: Job,
    at: str,
    out: Path,
    *,
    weights: Path | None = None,
    training: Training | None = None,
    criterion: str | None = None,
    export: Sequence[str] = (),
) -> dict[str, Any]:
    """`autoprune apply`: select, apply, score on the test split, save; returns apply.json, which it also writes."""
    check_formats(export)
    check_free(out)
    asked = replace(training or Training(), schedule=job.recovery.schedule, options=job.options("recovery"))
    if asked.kind == "full":
        build_recovery(asked.schedule, asked.options)  # what it refuses is told before the model is cut
    point = load_front(policy_path).select(at)
    trusted = trusted_criterion(point, (criterion, job.criterion_named))
    task = job.build_task()
    model = task.build()
    if weights is not None:
        load_weights(model, weights)
    example = task.example_inputs()
    if export:
        check_inputs(example)
    own, kept = searched_settings(point, settings_of(job)), policy_path.parent / "database"
    applied = _applied(point, model, example, task, own, trusted, asked, kept)
    scores = {n: dict(task.metrics(m, _TestSplit(task))) for n, m in (("dense", model), ("pruned", applied.model))}
    facts = {**applied.facts, "test": scores, "task": job.plain()["task"]}
    remember(applied.model, applied.kept, facts, str(policy_path))
    with whole_folder(out) as draft:
        write_model(applied.model, origin_of(applied.model).policy, draft)
        exported = export_model(applied.model, example, export, draft) if export else []
        names = [WEIGHTS, POLICY, *(path.name for path in exported), FACTS]
        facts["files"] = [str(out / name) for name in names]
        write_facts(facts, draft)
    return facts


@dataclass(frozen=True)
class _TestSplit:
    """The test split of a task at every pass anew: as a whole it may not fit into memory."""

    task: Task

    def __iter__(self) -> Iterator[Batch]:
        return (prepare(batch, torch.device("cpu")) for batch in self.task.split("test"))


def trusted_criterion(point: Point, said: Sequence[Named | None]) -> Criterion:
    """The criterion that ranks atoms: the user's first word, or the file's where it is one of autoprune's own.

    `said` are what the user names (--criterion, the job), in the order in which they count.

    Raises:
        InputError: the file names another one, which nobody else does.
    """
    found = point.base.space.get("criterion", "obs")
    name = found if isinstance(found, str) else str(found.get("name"))
    if said and said[0] is not None:
        return build_criterion(said[0])
    if name in plugins.names("criteria") or found in said:
        return build_criterion(found)
    raise InputError(
        f"the policy file names the criterion {name!r}, which is none of autoprune's own; a file is data, so nothing "
        f"is imported for it: if you trust that code, say --criterion {name} (criterion={name!r} in Python)"
    )


@dataclass(frozen=True)
class _Applied:
    """The pruned model, its point with the atoms that it really keeps, and what apply.json says."""

    model: nn.Module
    kept: Point
    facts: dict[str, Any]


@one_thread()
def _applied(
    point: Point,
    model: nn.Module,
    example: tuple[Tensor, ...],
    task: Task | None,
    settings: Settings,
    criterion: Criterion,
    training: Training,
    analysis: Path | None = None,
) -> _Applied:
    structure = matching(point, model, example, analysis)
    weights = weights_fingerprint(model)
    replayed = weights == point.base.weights_fingerprint
    if task is None:
        small, keep = _sliced(point, model, structure, replayed), dict(point.keep)
        validation, recipe = None, {}
    else:
        atoms = point.keep if replayed else None
        made = repaired(point, model, structure, task, settings, criterion, keep=atoms, training=training)
        small, keep, validation, recipe = made.model, dict(made.keep), dict(made.validation), dict(made.recipe)
    error = verify(small, model, structure, keep, example)
    lent = dict(model.named_parameters())
    for name, mine in small.named_parameters():
        mine.requires_grad_(lent[name].requires_grad)
    base = point.base if replayed else replace(point.base, weights_fingerprint=weights, order={})
    facts = {
        "point": point.id,
        "macs_ratio": point.ratio("macs"),
        "params_ratio": point.ratio("params"),
        "atoms": "replayed" if replayed else "ranked anew (other weights)",
        "test": None,
        "validation": validation,
        "promised": promised(point, training),
        "verification_error": error,
        "recipe": recipe or {"recipe": "none"},
        "files": [],
    }
    return _Applied(small.train(model.training), replace(point, keep=keep, base=base), facts)


def _sliced(point: Point, model: nn.Module, structure: Structure, replayed: bool) -> nn.Module:
    if not replayed:
        raise InputError(
            "the model has other weights than the policy was found on, so its atoms must be ranked anew, and that "
            "needs data: give task=..."
        )
    warnings.warn(
        "autoprune.apply without a task only slices: nothing is compensated or repaired; give task=...", stacklevel=4
    )
    small = copied(model)
    slim(small, structure, point.keep)
    return small
