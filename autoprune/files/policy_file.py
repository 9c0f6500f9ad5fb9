"""The only reader and writer of policy.json (schema autoprune/policy/1): a front, checked both ways."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autoprune import plugins
from autoprune.errors import InputError
from autoprune.files import old_form
from autoprune.files.policy_form import SCHEMA, FrontFile, GroupFile, MaskFile, PointFile
from autoprune.files.whole import write_whole
from autoprune.front import COUNTS, Base, Front, Point
from autoprune.front_table import flat_row
from autoprune.policy import Policy
from autoprune.structure import Group, Size, Slice, Stand


def save_front(front: Front, path: str | Path) -> None:
    """Write `front` to `path`, all of it or nothing.

    Raises:
        InputError: the front contradicts itself: a width off its grid, kept atoms that do not match a width.
    """
    write_whole(Path(path), front_text(front, str(path)))


def front_text(front: Front, path: str = "policy.json") -> str:
    """What `save_front` writes to `path`."""
    _check_front(front, path)
    try:
        return _compact(json.dumps(_front_to_json(front), indent=1, allow_nan=False)) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: a policy file holds plain finite values only: {error}") from error


def policy_path(given: str | Path) -> Path:
    """The policy file that is meant by its own path, or by the folder of a search.

    Raises:
        InputError: a folder without one.
    """
    path = Path(given)
    if not path.is_dir():
        return path
    if not (path / "policy.json").exists():
        raise InputError(f"{path} holds no policy.json: not a run folder, or its search has not finished")
    return path / "policy.json"


def load_front(path: str | Path) -> Front:
    """The front in a policy.json, equal to the one that was saved; unknown minor keys are ignored.

    Raises:
        InputError: missing, truncated, foreign, of a newer major version, or at odds with itself.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"cannot read the policy file {path}: {reason}") from error
    return read_front(text, path)


def read_front(text: str, path: str | Path = "policy.json") -> Front:
    """The front in the text of a policy file that lies at `path`; raises as `load_front` does."""
    _check_schema(text, str(path))
    try:
        parsed = FrontFile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path} is damaged: {where}: {first['msg']}") from error
    front = _front_from_file(parsed, str(path))
    _check_front(front, str(path))
    return front


def save_csv(front: Front, path: str | Path) -> None:
    """Write `csv_text` to `path`, all of it or nothing."""
    write_whole(Path(path), csv_text(front))


def csv_text(front: Front) -> str:
    """The points as a table: id, costs, losses (`loss.validation`), metrics (`validation.accuracy`), widths."""
    rows = [flat_row(point) for point in front]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or ["id"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _front_to_json(front: Front) -> dict[str, Any]:
    base = front.base
    return {
        "schema": SCHEMA,
        "kind": "front",
        "base": _base_to_json(base),
        "space": dict(base.space),
        "data": base.data,
        "groups": {group.name: _group_to_json(group, base.order.get(group.name)) for group in base.groups},
        "points": [_point_to_json(point) for point in front],
        "measured_on": dict(front.measured_on),
        "provenance": dict(front.provenance),
    }


def _compact(text: str) -> str:
    """Lists of numbers in one line each: strings hold no newline in JSON, so none is touched."""
    return re.sub(r"\[\n[\d\s,.eE+-]*\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)


def _base_to_json(base: Base) -> dict[str, Any]:
    prints = {"structure": base.structure_fingerprint, "weights": base.weights_fingerprint}
    return {
        "fingerprint": {"version": base.fingerprint_version, **prints},
        "model": base.model,
        "inputs": [dict(spec) for spec in base.inputs],
        "costs": _whole_numbers(base.costs),
        "metrics": {split: dict(values) for split, values in base.metrics.items()},
        **({"directions": dict(base.directions)} if base.directions else {}),
        **({"shapes": {name: list(shape) for name, shape in base.shapes.items()}} if base.shapes else {}),
        **({"task": dict(base.task)} if base.task else {}),
    }


def _group_to_json(group: Group, order: Sequence[int] | None) -> dict[str, Any]:
    slices = [_special(s) for s in group.slices]
    ranks = {} if order is None else {"order": list(order)}
    more = {name: [_special(s) for s in some] for name in ("sizes", "stands") if (some := getattr(group, name))}
    whole: dict[str, Any] = {"matrices": list(group.matrices)} if group.matrices else {}
    whole |= {"pattern": group.pattern} if group.pattern else {}
    return {
        "kind": group.kind,
        "width": group.width,
        "grid": list(group.grid),
        **ranks,
        "slices": slices,
        **more,
        **whole,
    }


def _special(part: Slice | Size | Stand) -> dict[str, Any]:
    """Its fields, without those that have their default."""
    return {f.name: value for f in fields(part) if (value := getattr(part, f.name)) != f.default}


def _point_to_json(point: Point) -> dict[str, Any]:
    order = [group.name for group in point.base.groups]
    widths = point.policy.as_dict()
    ranked = {name: point.keep[name] for name in order if name in point.keep}
    own: dict[str, Any] = {n: list(kept) for n, kept in ranked.items() if kept != _first(point.base, n, widths[n])}
    own |= {name: {"mask": mask} for name, mask in point.masks.items()}
    return {
        "id": point.id,
        "widths": {name: widths[name] for name in order},
        "keep": own,
        "costs": _whole_numbers(point.costs),
        "losses": {split: dict(loss) for split, loss in point.losses.items()},
        "metrics": {split: dict(values) for split, values in point.metrics.items()},
        **({"finetuned": dict(point.finetuned)} if point.finetuned else {}),
        "trial": point.trial,
    }


def _first(base: Base, group: str, width: int) -> tuple[int, ...] | None:
    """The atoms that a group keeps by its order at a width; None where the file ranks it not."""
    order = base.order.get(group)
    return None if order is None else tuple(sorted(order[:width]))


def _whole_numbers(costs: Mapping[str, Any]) -> dict[str, Any]:
    """Counts as whole numbers, whatever arithmetic they came from."""
    return {k: int(v) if k in COUNTS and float(v).is_integer() else v for k, v in costs.items()}


def _front_from_file(parsed: FrontFile, path: str) -> Front:
    try:
        groups = tuple(_group_from_file(name, g) for name, g in parsed.groups.items())
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    b = parsed.base
    prints = b.fingerprint.structure, b.fingerprint.weights
    base = Base(
        *prints,
        b.model,
        b.inputs,
        b.costs,
        b.metrics,
        groups,
        parsed.space,
        parsed.data,
        directions=b.directions,
        shapes=b.shapes,
        fingerprint_version=b.fingerprint.version,
        task=b.task or _named_task(b.model),
        order={name: g.order for name, g in parsed.groups.items() if g.order is not None},
    )
    points = tuple(_point_from_file(p, base, parsed.provenance.get("seed", 0)) for p in parsed.points)
    front = Front(points, base, parsed.measured_on, parsed.provenance)
    return front if all(p.losses for p in parsed.points) else _without_lost_metrics(front)


def _group_from_file(name: str, g: GroupFile) -> Group:
    slices, sizes = (Slice(**s.model_dump()) for s in g.slices), (Size(**s.model_dump()) for s in g.sizes)
    stands = tuple(Stand(**s.model_dump()) for s in g.stands)
    return Group(name, g.kind, g.width, tuple(slices), g.grid, tuple(sizes), stands, g.matrices, g.pattern)


def _named_task(model: str) -> dict[str, Any]:
    """The task of a file of 0.1.0, which says `digits:CifarResNet`; a task of arguments says their model instead."""
    name = model.partition(":")[0]
    return {"name": name, "args": {}} if name in plugins.names("tasks") else {}


def _point_from_file(p: PointFile, base: Base, seed: int) -> Point:
    ranked = {name: kept for name, w in p.widths.items() if (kept := _first(base, name, w)) is not None}
    own = {name: kept for name, kept in p.keep.items() if not isinstance(kept, MaskFile)}
    losses: dict[str, Mapping[str, Any]] = {k: v.model_dump(exclude_none=True) for k, v in p.losses.items()}
    metrics: dict[str, Mapping[str, float]] = {k: v for k, v in p.metrics.items()}
    finetuned: Mapping[str, Any] = p.finetuned
    if not losses:
        old = {split: old_form.apart(figures) for split, figures in p.metrics.items()}
        losses = {split: figures.loss for split, figures in old.items() if figures.loss}
        metrics = {split: figures.metrics for split, figures in old.items()}
        if "finetuned" in old:
            finetuned = old_form.finetuned(old["finetuned"].recipe, seed)
        elif base.space.get("tier") == "tune" and "validation" in losses:  # its figures on validation are tuned ones
            finetuned = old_form.finetuned({"steps": base.space.get("finetune_steps", 100)}, seed)
            losses, metrics = ({**d, "finetuned": d["validation"]} for d in (losses, metrics))
    return Point(
        p.id,
        Policy.of(p.widths),
        {**ranked, **own},
        p.costs,
        losses=losses,
        metrics=metrics,
        trial=p.trial,
        base=base,
        finetuned=finetuned,
        masks={name: kept.mask for name, kept in p.keep.items() if isinstance(kept, MaskFile)},
    )


def _without_lost_metrics(front: Front) -> Front:
    """Dense metrics that no point of an old file has, because the loss had taken their names, cannot be compared."""
    there = {name for point in front for name in point.metrics.get("validation", {})}
    dense = {
        split: {k: v for k, v in values.items() if k in there or split != "validation"}
        for split, values in front.base.metrics.items()
    }
    base = replace(front.base, metrics=dense)
    return replace(front, base=base, points=tuple(replace(p, base=base) for p in front))


def _check_schema(text: str, path: str) -> None:
    """InputError unless the text is JSON that claims to be ours, in a version that we read."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is truncated or not JSON: {error}") from error
    claim = data.get("schema") if isinstance(data, dict) else None
    match = re.fullmatch(r"autoprune/policy/(\d+)(\.\d+)?", claim) if isinstance(claim, str) else None
    if match is None:
        raise InputError(f"{path} is not an autoprune policy file: its schema is {claim!r}, not {SCHEMA!r}")
    if int(match[1]) > 1:
        raise InputError(f"{path} has the newer schema {claim!r}; this version reads {SCHEMA!r}: upgrade autoprune")


def _check_front(front: Front, path: str) -> None:
    if min(front.base.costs.values(), default=1) <= 0:
        raise InputError(f"{path}: base.costs must be positive, not {dict(front.base.costs)}")
    for group in front.base.groups:
        order = front.base.order.get(group.name)
        if order is not None and sorted(order) != list(range(group.width)):
            raise InputError(f"{path}: the order of group {group.name!r} must name its {group.width} atoms once")
    ids = [point.id for point in front]
    if len(set(ids)) != len(ids):
        raise InputError(f"{path}: the ids of points must be unique, not {ids}")
    for point in front:
        try:
            _check_point(point, front.base)
        except InputError as error:
            raise InputError(f"{path}: point {point.id}: {error}") from error


def _check_masks(point: Point, base: Base) -> None:
    """A mask for every group of kind weight that has zeros, but for points that were carried over; none for others."""
    widths = point.policy.as_dict()
    sparse = {g.name for g in base.groups if g.kind == "weight" and widths[g.name] < g.width}
    if other := sorted(point.masks.keys() - sparse):
        raise InputError(f"it has a mask for {other[0]!r}, which is no group of kind weight with zeros")
    if missing := sorted(sparse - point.masks.keys()) if "transfer" not in base.space else []:
        raise InputError(f"group {missing[0]!r} is of kind weight and has zeros: its keep is a mask, and there is none")


def _check_point(point: Point, base: Base) -> None:
    widths = point.policy.as_dict()
    names = {group.name for group in base.groups}
    ranked = {group.name for group in base.groups if group.kind != "weight"}
    if listed := sorted(point.keep.keys() & (names - ranked)):
        raise InputError(f"group {listed[0]!r} is of kind weight: its keep is a mask, not atoms")
    for what, given, wanted in (("widths", set(widths), names), ("keep", set(point.keep), ranked)):
        if given != wanted:
            raise InputError(f"its {what} must name every group once; wrong or missing: {sorted(given ^ wanted)}")
    _check_masks(point, base)
    for group in base.groups:
        group.check(widths[group.name])
        if group.name not in ranked:
            continue
        keep = tuple(point.keep[group.name])
        ascending = list(keep) == sorted(set(keep))
        inside = not keep or (keep[0] >= 0 and keep[-1] < group.width)
        if len(keep) != widths[group.name] or not ascending or not inside:
            raise InputError(
                f"group {group.name!r} must keep {widths[group.name]} ascending atoms below {group.width}, not {keep}"
            )
    missing = [cost for cost in base.costs if cost not in point.costs]
    if missing:
        raise InputError(f"it has no cost {missing[0]!r}")
    if "loss" not in point.losses.get("validation", {}):
        raise InputError("it has no losses.validation")
