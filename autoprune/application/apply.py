"""A point of a front onto a dense model: cut, repaired as in the search, trained, verified."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autoprune import plugins
from autoprune.application.by_shapes import ranked, sliced
from autoprune.application.checkpoints import Place
from autoprune.application.loader import load_applied as load_applied
from autoprune.application.loader import remember
from autoprune.application.match import matching
from autoprune.application.order import task_digest
from autoprune.application.plain import rebuild_facts
from autoprune.application.repair import Manner, repairing, searched_settings
from autoprune.application.training import Training, promised
from autoprune.application.transfer import HINT, KEY
from autoprune.criteria import Named, build_criterion
from autoprune.errors import InputError
from autoprune.evaluator.settings import Settings
from autoprune.files.job import checked_task
from autoprune.front import Point
from autoprune.front_table import ratio_of
from autoprune.protocols import Criterion, Step, Task, finished
from autoprune.recovery import build_recovery
from autoprune.tracing.copies import check_module
from autoprune.tracing.fingerprint import weights_fingerprint
from autoprune.tracing.masks import masks_of
from autoprune.tracing.one_thread import one_thread
from autoprune.tracing.verify import verify
from autoprune.version import __version__


def apply(  # noqa: PLR0913  # the words of the verb, as the command line has them
    point: Point,
    model: nn.Module,
    example_inputs: tuple[Tensor, ...],
    *,
    task: Task | None = None,
    settings: Settings | None = None,
    finetune: str = "proxy",
    finetune_epochs: float | None = None,
    criterion: Named | None = None,
    recovery: str | Mapping[str, Any] | None = None,
) -> nn.Module:
    """A smaller, plain copy of `model`, pruned as `point` says; the lent model is untouched.

    With the weights of the search the kept atoms are replayed, with others they are ranked anew by the point's
    criterion. With a `task` the pruned model is repaired as in the search (compensation, batch norm, refit) on its
    calibration data and trained as `finetune` says: `proxy` repeats what trained the point in the search, and nothing
    where nothing did, so that the model is what the front promises; `none` repairs only; `full` is the recovery, for
    `finetune_epochs`, which imply it. Without a task it is sliced only. `settings` are by default those of the search
    as far as the point knows them. A criterion of your own that the point names must be named again, as `criterion`:
    a file is data, and nothing is imported because of it.

    `recovery`, which implies `full`, is the name of one, or a mapping as in a job: `schedule`, `options`, and here also
    `checkpoints`, a folder where its trainings are kept while they run: the same call goes on inside them after a kill.

    Raises:
        InputError: the model has another structure (says where), the policy was applied to it before, or the recovery
            does not take its options.
        RunError: the pruned model fails its verification.
    """
    if not isinstance(point, Point):
        raise InputError(f"point must be one of a front, as front.select(macs=0.5) gives, not a {type(point).__name__}")
    check_module(model)
    if task is not None:
        checked_task(task, "task is")
    # the default word gives way to epochs, which cannot be told from one that was said
    training = Training.of(None if finetune == "proxy" else finetune, finetune_epochs, recovery)
    check_recovery(training, model, task)
    trusted = trusted_criterion(point, () if criterion is None else (criterion,))
    own = settings or _searched(point, task)
    place = None
    if training.checkpoints is not None:
        data = "" if task is None else task_digest(task)
        code = [plugins.source_digest(value) for value in training.options.values() if callable(value)]
        told = (__version__, point.id, point.policy, weights_fingerprint(model), own, training, criterion, data, code)
        place = Place(training.checkpoints, f"sha256:{hashlib.sha256(repr(told).encode()).hexdigest()}")
    manner = Manner(own, trusted, training, place)
    with one_thread():
        applied = finished(applying(point, model, example_inputs, task, manner))
    if place is not None:
        place.clear()
    facts = {**applied.facts, "task": point.base.task or None}
    remember(applied.model, applied.kept, facts, f"point {point.id}")
    return applied.model


def check_recovery(training: Training, model: nn.Module, task: Task | None) -> None:
    """What a full recovery refuses, before any work.

    Raises:
        InputError: there are no data to train on, no such recovery, or it does not take its options, or `model`.
    """
    if training.kind != "full":
        return
    if task is None:
        raise InputError("a full recovery trains on data: give a task (--task with a job)")
    build_recovery(training.recovery, training.options).check(model)


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
class Applied:
    """The pruned model, its point with the atoms that it really keeps, and what apply.json says."""

    model: nn.Module
    kept: Point
    facts: dict[str, Any]


def applying(
    point: Point, model: nn.Module, example: tuple[Tensor, ...], task: Task | None, manner: Manner
) -> Generator[Step, None, Applied]:
    """Cut, and where there is a task repair, train and score; steps tell how far it is.

    Raises:
        InputError: the model is another one, or its atoms cannot be ranked.
        RunError: the pruned model fails its verification.
    """
    yield Step("analysis")
    structure, training = matching(point, model, example, manner.analysis, HINT), manner.training
    weights = weights_fingerprint(model)
    replayed = weights == point.base.weights_fingerprint
    moved = point.base.space.get(KEY)
    if task is None:
        keep = dict(point.keep) if replayed else ranked(point, model, structure, manner.criterion)
        small = sliced(point, model, structure, keep, manner.criterion)
        validation, recipe, course, masks = None, {}, {}, None
    else:
        made = yield from repairing(point, model, structure, task, manner, point.keep if replayed else None)
        small, keep, validation, recipe = made.model, dict(made.keep), dict(made.validation), dict(made.recipe)
        masks = made.masks
        course = dict(made.course)
    yield Step("verification")
    error = verify(small, model, structure, keep, example)
    lent = dict(model.named_parameters())
    for name, mine in small.named_parameters():
        mine.requires_grad_(lent[name].requires_grad)
    masks = masks_of(small, structure, point.policy.as_dict()) if masks is None else masks
    base = point.base if replayed else replace(point.base, weights_fingerprint=weights, order={})
    facts: dict[str, Any] = {
        "point": point.id,
        "macs_ratio": point.ratio("macs"),
        "params_ratio": point.ratio("params"),
        "costs": _costs(point),
        "atoms": _atoms(point, keep, masks, replayed),
        "test": None,
        "validation": validation,
        "course": course or None,
        "promised": None if moved else promised(point, training),
        "verification_error": error,
        "recipe": recipe or {"recipe": "none"},
        "rebuild": rebuild_facts(model, small),
        "versions": {"autoprune": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "files": [],
        **({KEY: dict(moved)} if moved else {}),
    }
    kept = _kept(replace(point, keep=keep, masks=masks, base=base), validation if moved else None)
    return Applied(small.train(model.training), kept, facts)


def _kept(kept: Point, found: Mapping[str, Any] | None) -> Point:
    """The point as it is; the figures of another structure give way to those that were found here."""
    if found is None:
        return kept
    return replace(kept, losses={"validation": found["loss"]}, metrics={"validation": found["metrics"]}, finetuned={})


def _costs(point: Point) -> dict[str, dict[str, int]]:
    """MACs a sample, parameters and, where the point has them, numbers that are not zero, of both models."""
    known = [n for n in ("macs", "params", "nonzeros", "effective_macs") if ratio_of(point, n) is not None]
    dense = {name: float(point.base.costs[name]) for name in known}
    return {n: {"dense": round(dense[n]), "pruned": round(dense[n] * point.ratio(n))} for n in known}


def _atoms(point: Point, keep: Mapping[str, tuple[int, ...]], masks: Mapping[str, str], replayed: bool) -> str:
    """How the kept atoms were chosen, and the numbers of weights that have zeros, in words."""
    if not replayed:
        return f"ranked anew ({'another structure' if KEY in point.base.space else 'other weights'})"
    if keep != dict(point.keep):
        return "ranked anew (by the recovery)"
    other = [name for name, mask in masks.items() if mask != point.masks.get(name)]
    return "replayed" if not other else f"replayed, but for the zeros of {len(other)} weights (made anew here)"
