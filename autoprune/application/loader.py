"""Applied models on disk: `save` and `load` are a pair, `load_applied` starts from a dense model at hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune import plugins
from autoprune.application.card import card
from autoprune.application.hugging_face import CONFIG, TOKENIZER, dense_from_config, write_config
from autoprune.application.masks import MASKS, read_whole
from autoprune.application.match import difference, matching
from autoprune.application.stored import widened, write_weights
from autoprune.application.zeros import zeros_in
from autoprune.errors import InputError
from autoprune.files.job import Job
from autoprune.files.policy_file import front_text, load_front, read_front
from autoprune.files.whole import read_mapping, whole_folder
from autoprune.front import Front, Point
from autoprune.structure import Op, Structure, TensorSpec
from autoprune.tasks._weights import fill
from autoprune.tracing.copies import copied
from autoprune.tracing.fingerprint import weights_fingerprint
from autoprune.tracing.slim import named_tensors, slim

ORIGIN = "autoprune_origin"
"""Attribute of an applied model that says where it comes from: plain strings, so that it pickles anywhere."""
WEIGHTS, POLICY, FACTS, CARD = "model.safetensors", "policy.json", "apply.json", "README.md"
OLD_FACTS = "report.json"
EXPORTS = ("model.onnx", "model.onnx.data", "model.int8.onnx", "model.pt2", CARD, MASKS)
FOREIGN = ("model.xml", "model.bin", "model.mlpackage")
"""Exports for OpenVINO and Core ML."""
OURS = frozenset({WEIGHTS, POLICY, FACTS, OLD_FACTS, CONFIG, *TOKENIZER, *EXPORTS, *FOREIGN, *plugins.names("deploy")})
OF_APPLY = ("request", "int8", "bytes", "failed", "folder", "zeros")
"""Facts of the folder that `apply` wrote, which are not those of another one."""
Factory = Callable[[], Any]


@dataclass(frozen=True)
class Origin:
    """What an applied model remembers: its policy with the kept atoms, the facts of apply.json, its weights then."""

    policy: str
    facts: Mapping[str, Any]
    weights: str


def remember(model: nn.Module, kept: Point, facts: Mapping[str, Any], source: str) -> None:
    """Make `model` know where it comes from; it stays a plain module of its own class."""
    policy = front_text(Front((kept,), kept.base, {}, {"applied_from": source}))
    told = {"policy": policy, "facts": json.dumps(facts), "weights": weights_fingerprint(model)}
    setattr(model, ORIGIN, told)


def origin_of(model: nn.Module) -> Origin:
    """What `remember` left; InputError where the model is not from `apply`."""
    told = getattr(model, ORIGIN, None)
    if not isinstance(told, dict):
        raise InputError(f"this {type(model).__name__} does not come from autoprune.apply or autoprune.load")
    return Origin(told["policy"], json.loads(told["facts"]), told["weights"])


def point_of(model: nn.Module) -> Point:
    """The point that an applied model was cut by, with its kept atoms."""
    return read_front(origin_of(model).policy)[0]


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a model of `autoprune.apply` (trained further or not) to `folder`, from which `load` builds it again.

    The folder is written whole or not at all; one that holds something else is refused. Figures of apply.json that
    further training has made untrue are left out.

    Raises:
        InputError: the model does not come from `apply`, or the folder holds other things.
        RunError: the disk is full.
    """
    origin, out = origin_of(model), Path(folder)
    facts = {key: value for key, value in origin.facts.items() if key not in OF_APPLY}
    if weights_fingerprint(model) != origin.weights:
        facts |= dict.fromkeys(("test", "validation", "course", "promised", "verification_error", "latency"))
        facts |= {"recipe": {"recipe": "your own"}}
    check_free(out)
    beside = Path(str(origin.facts.get("folder", ""))) if origin.facts.get("folder") else None
    with whole_folder(out) as draft:
        write_model(model, origin.policy, draft)
        facts |= zeros_in(model, point_of(model), draft / WEIGHTS)
        own = [WEIGHTS, *([MASKS] if (draft / MASKS).exists() else []), POLICY]
        told = {**facts, "files": [*own, *write_config(model, draft, beside), FACTS, CARD]}
        write_facts(told, draft)
        (draft / CARD).write_text(card(told, point_of(model)), encoding="utf-8")


def load(folder: str | Path, factory: Factory | str | None = None) -> nn.Module:
    """The model that `save` or `autoprune apply --out FOLDER` wrote, in eval mode.

    A model of transformers is built anew from the folder's config.json, and answers model(**batch) as the dense one
    does; a built-in task's model as apply.json says; any other needs its `factory` here: a function that
    returns the dense model (or a Task), or its "module:function". Nothing is imported because a file names it. Of a
    model that was pruned twice the factory is the first folder's: `lambda: autoprune.load(FIRST)`.

    Raises:
        InputError: the folder holds no applied model, or the factory is needed or makes another one.
    """
    point, facts = _opened(Path(folder))
    model = _dense(Path(folder), facts, factory)
    said = difference(point.base, model)
    if said:
        raise InputError(f"{folder}: the factory's model is another structure: {said}")
    structure = Structure(point.base.groups, (_all_tensors(model),))
    return _cut(model, structure, point, facts, Path(folder)).eval()


def load_applied(folder: str | Path, model: nn.Module, example_inputs: tuple[Tensor, ...]) -> nn.Module:
    """The pruned model that `autoprune apply --out FOLDER` saved, from the dense model (its weights do not matter).

    Raises:
        InputError: the folder holds no applied model, or `model` is another structure.
    """
    point, facts = _opened(Path(folder))
    structure = matching(point, model, example_inputs)
    return _cut(copied(model), structure, point, facts, Path(folder))


def check_free(out: Path) -> None:
    """InputError unless `out` is new, empty, or holds what `apply` wrote and nothing else: it is replaced whole."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"--out {out} is a file; choose a folder")
    inside = {path.name for path in out.iterdir()}
    if inside & {"study.journal", "front.csv", "job.yaml", "database"}:
        raise InputError(f"--out {out} holds the front of a search, which apply would overwrite; choose another folder")
    ours = OURS | {Path(str(name)).name for name in read_facts(out).get("files") or ()}  # a format of the user's own
    foreign = sorted(n for n in inside - OURS if not any(n == o or n.startswith(f"{o}.") for o in ours))
    if foreign or (inside and not inside & {FACTS, OLD_FACTS}):
        what = foreign or sorted(inside)
        raise InputError(
            f"--out {out} holds {what[0]!r}, which apply did not write there; choose a new or empty folder"
        )


def check_parent(out: Path) -> None:
    """InputError unless `out` may hold a folder for each of several points: it is no file, and nobody's own folder."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; choose a folder")
    inside = {path.name for path in out.iterdir()} if out.exists() else set()
    own = inside & {FACTS, OLD_FACTS, "study.journal", "front.csv", "job.yaml"}
    if own:
        raise InputError(f"--out {out} holds {min(own)!r}, and several points want a folder for themselves")


def write_model(model: nn.Module, policy: str, folder: Path) -> None:
    """Weights and policy into an open draft of a folder."""
    write_weights(model, read_front(policy)[0], folder / WEIGHTS)
    (folder / POLICY).write_text(policy, encoding="utf-8")


def write_facts(facts: Mapping[str, Any], folder: Path) -> None:
    """apply.json into an open draft of a folder."""
    (folder / FACTS).write_text(json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8")


def _opened(folder: Path) -> tuple[Point, Mapping[str, Any]]:
    """The one point of an applied folder and its facts."""
    lacking = [name for name in (POLICY, WEIGHTS) if not (folder / name).is_file()]
    if lacking:
        searched = POLICY not in lacking
        word = "it is the folder of a search, and autoprune.apply takes its points" if searched else "no such folder"
        why = word if searched or not folder.exists() else "autoprune apply --out, or autoprune.save, makes one"
        raise InputError(f"{folder} holds no applied model (no {lacking[0]}): {why}")
    front = load_front(folder / POLICY)
    if len(front) != 1:
        raise InputError(f"{folder / POLICY} holds {len(front)} points, an applied model has one")
    return front[0], read_facts(folder)


def read_facts(folder: Path) -> Mapping[str, Any]:
    """apply.json, or report.json of version 0.1.0; empty where there is neither."""
    path = next((folder / name for name in (FACTS, OLD_FACTS) if (folder / name).is_file()), None)
    if path is None:
        return {}
    return read_mapping(path)


def _cut(model: nn.Module, structure: Structure, point: Point, facts: Mapping[str, Any], folder: Path) -> nn.Module:
    """Cut `model` in place and fill it from the folder."""
    slim(model, structure, point.keep)
    fill(model, widened(read_whole(folder / WEIGHTS, point)), folder / WEIGHTS)
    remember(model, point, {**facts, "folder": str(folder.resolve())}, str(folder))
    return model


def _dense(folder: Path, facts: Mapping[str, Any], factory: Factory | str | None) -> nn.Module:
    """The dense model, by the factory that was passed or the built-in task that the file names."""
    made: Any
    with torch.random.fork_rng(devices=[]):  # first weights are drawn, then overwritten: leave no trace of it
        if factory is not None:
            make = plugins.load_object(factory) if isinstance(factory, str) else factory
            made = make()
        elif (made := dense_from_config(folder)) is None:
            made = _built_in(folder, facts.get("task"))
        made = made.build() if hasattr(made, "build") else made
    if not isinstance(made, nn.Module):
        raise InputError(f"the factory returned a {type(made).__name__}, not a torch.nn.Module")
    return made


def _built_in(folder: Path, task: Any) -> Any:
    """The named task of a file, or the model of ours that its arguments name; nothing of a user's is imported."""
    name, args = (task.get("name"), task.get("args", {})) if isinstance(task, dict) else (None, {})
    model = args.get("model") if isinstance(args, dict) else None
    own = isinstance(model, str) and ":" in model
    if name not in plugins.names("tasks") or (own and not str(model).startswith("autoprune.tasks:")):
        raise InputError(
            f"{folder}: its model is not one of autoprune's own; pass the factory that makes the dense model: "
            "autoprune.load(DIR, factory=...)"
        )
    if own:
        return plugins.load_object(str(model))()
    return Job.from_dict({"task": {"name": name, "args": args}}, source=str(folder / FACTS)).build_task()


def _all_tensors(model: nn.Module) -> Op:
    """What `slim` wants to know of the dense tensors."""
    specs = (TensorSpec(n, tuple(t.shape), t.element_size()) for n, t in named_tensors(model).items())
    return Op("(all)", type(model).__name__, 0, tensors=tuple(specs))
