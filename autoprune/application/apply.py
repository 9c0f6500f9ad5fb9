"""The verb `apply`: a point of a front onto fresh weights, repaired as in the search, verified, saved."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoprune.application.match import matching
from autoprune.criteria import build_criterion
from autoprune.database.batches import StatisticsOnly, in_format, prepare, size
from autoprune.database.store import build_database
from autoprune.errors import InputError
from autoprune.evaluation import Ask
from autoprune.evaluator.finetune import BATCH_SIZE, finetune
from autoprune.evaluator.precision import Precision
from autoprune.evaluator.prepared import prepared_model, prepared_parts
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.export import export as export_model
from autoprune.files.job import Job
from autoprune.files.policy_file import load_front, save_front
from autoprune.front import Base, Front, Point
from autoprune.protocols import Task
from autoprune.record.folder import make_folder
from autoprune.run.prepare import settings_of
from autoprune.structure import Structure
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
    finetune_epochs: float = 0.0,
) -> nn.Module:
    """A smaller, plain copy of `model`, pruned as `point` says; the lent model is untouched.

    With the weights of the search the kept atoms are replayed, with others they are ranked anew by the point's
    criterion. With a `task` the pruned model is repaired as in the search (compensation, batch norm, refit) on its
    calibration data, at the tier that scored the point, and trained for `finetune_epochs`; without one it is sliced
    only. `settings` are by default those of the search as far as the point knows them; a precision that is left to
    "auto" is the search's too.

    Raises:
        InputError: the model has another structure (says where), or the policy was applied to it before.
        RunError: the pruned model fails its verification.
    """
    settings = settings or Settings(calibration=int(point.base.space.get("calibration", Settings.calibration)))
    return _apply(point, model, example_inputs, task, settings, finetune_epochs).model


def load_applied(folder: str | Path, model: nn.Module, example_inputs: tuple[Tensor, ...]) -> nn.Module:
    """The pruned model that `autoprune apply --out FOLDER` saved, from the dense model (its weights do not matter)."""
    point = load_front(Path(folder) / "policy.json")[0]
    structure = matching(point, model, example_inputs)
    small = copy.deepcopy(model)
    slim(small, structure, point.keep)
    small.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return small


@one_thread()
def apply_file(
    policy_path: Path,
    job: Job,
    weights: Path | None,
    at: str,
    finetune_epochs: float,
    export: Sequence[str],
    out: Path,
) -> dict[str, Any]:
    """`autoprune apply`: select, apply, score on the test split, save; returns the report that it also writes."""
    searched = any((out / name).exists() for name in ("study.journal", "front.csv"))  # a record may be in a database
    if (out / "policy.json").exists() and (searched or out == policy_path.parent):
        raise InputError(f"--out {out} holds the front of a search, which apply would overwrite; choose another folder")
    if not 0.0 <= finetune_epochs < 1e4:
        raise InputError(f"--finetune-epochs must be a number of epochs from 0 to 10000, not {finetune_epochs}")
    point, settings = load_front(policy_path).select(at), settings_of(job)
    task = job.build_task()
    model = task.build()
    if weights is not None:
        _load_weights(model, weights)
    example = task.example_inputs()
    applied = _apply(point, model, example, task, settings, finetune_epochs)
    make_folder(out)
    test = [prepare(b, torch.device("cpu")) for b in task.split("test")]
    scores = {n: dict(task.metrics(m, test)) for n, m in (("dense", model), ("pruned", applied.model))}
    state = {k: v.contiguous().clone() for k, v in applied.model.state_dict().items()}
    save_file(state, out / "model.safetensors")
    kept = replace(point, keep=applied.keep)
    save_front(Front((kept,), point.base, {}, {"applied_from": str(policy_path)}), out / "policy.json")
    files = [str(out / "model.safetensors"), str(out / "policy.json")]
    if export:
        files += [str(p) for p in export_model(applied.model, example, export, out)]
    report = {
        "point": point.id,
        "macs_ratio": point.ratio("macs"),
        "params_ratio": point.ratio("params"),
        "atoms": "replayed" if applied.replayed else "ranked anew (other weights)",
        "test": scores,
        "verification_error": applied.error,
        "finetune_steps": applied.steps,
        "files": files,
    }
    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


@dataclass(frozen=True)
class _Applied:
    model: nn.Module
    keep: Mapping[str, tuple[int, ...]]
    replayed: bool
    error: float
    steps: int


@one_thread()
def _apply(
    point: Point,
    model: nn.Module,
    example: tuple[Tensor, ...],
    task: Task | None,
    settings: Settings,
    epochs: float,
) -> _Applied:
    structure = matching(point, model, example)
    replayed = weights_fingerprint(model) == point.base.weights_fingerprint
    if task is None:
        small, keep, steps = _sliced(point, model, structure, replayed), dict(point.keep), 0
    else:
        small, keep, steps = _repaired(point, model, structure, task, settings, (replayed, epochs))
    error = verify(small, model, structure, keep, example)
    for mine, theirs in zip(small.parameters(), model.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return _Applied(small.train(model.training), keep, replayed, error, steps)


def _sliced(point: Point, model: nn.Module, structure: Structure, replayed: bool) -> nn.Module:
    if not replayed:
        raise InputError(
            "the model has other weights than the policy was found on, so its atoms must be ranked anew, and that "
            "needs data: give task=..."
        )
    warnings.warn(
        "autoprune.apply without a task only slices: nothing is compensated or repaired; give task=...", stacklevel=4
    )
    small = copy.deepcopy(model)
    slim(small, structure, point.keep)
    return small


def _repaired(
    point: Point,
    model: nn.Module,
    structure: Structure,
    task: Task,
    settings: Settings,
    how: tuple[bool, float],
) -> tuple[nn.Module, dict[str, tuple[int, ...]], int]:
    replayed, epochs = how
    device = settings.torch_device
    dense = prepared_model(task, device, copy.deepcopy(model))
    seen = StatisticsOnly(task, prepared_parts(task, settings, dense).statistics)
    criterion = build_criterion(point.base.space.get("criterion", "obs"))
    database = build_database(dense, structure, seen, criterion, point.keep if replayed else None)
    steps = 0
    if epochs > 0:
        n_train = sum(size(b) for b in task.split("train"))
        steps = max(1, round(epochs * n_train / BATCH_SIZE))
    space = point.base.space
    tune_steps = int(space.get("finetune_steps", settings.finetune_steps))
    precision = _precision(point.base, settings)
    # what the point costs is in its file; a latency would want its table
    as_searched = replace(settings, finetune_steps=tune_steps, precision=precision, costs=())
    evaluator = TieredEvaluator(task, structure, database, as_searched, dense)
    small = copy.deepcopy(evaluator.repaired(Ask(point.policy, space.get("tier", "refit"))))
    if steps:
        finetune(small, evaluator.lesson(steps), steps, settings.seed)
    keep = {n: tuple(database.keep(n, w).tolist()) for n, w in point.policy.widths}
    return in_format(small, torch.contiguous_format).to(next(model.parameters()).device), keep, steps


def _precision(base: Base, settings: Settings) -> Literal["auto", "fp32", "bf16"]:
    """That of the search where the settings leave it open: atoms and repairs were judged in it."""
    found = base.space.get("precision")  # older files do not say, newer ones may know more of them
    known = {name: name for name in get_args(Precision)}
    return known.get(found, "auto") if settings.precision == "auto" else settings.precision


def _load_weights(model: nn.Module, path: Path) -> None:
    from autoprune.tasks._weights import load_weights

    load_weights(model, path)
