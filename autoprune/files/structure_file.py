"""A Structure as one JSON file that is read back whole, or taken for none: what is in doubt is made anew."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from autoprune.errors import AutopruneError
from autoprune.files.whole import write_whole
from autoprune.structure import Group, Op, Size, Slice, Stand, Structure, TensorSpec


def save_structure(path: Path, key: str, structure: Structure) -> None:
    """Write `structure` under `key`, which says what it was found in."""
    body = {
        "groups": [asdict(group) for group in structure.groups],
        "ops": [asdict(op) for op in structure.ops],
        "frozen": dict(structure.frozen),
        "fingerprint": structure.fingerprint,
    }
    write_whole(path, json.dumps({"key": key, "sum": _sum(body), **body}))


def load_structure(path: Path, key: str) -> Structure | None:
    """The structure of a file, or None where there is none that can be believed: another key, damage, garbage."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, AutopruneError):
        raw = json.loads(path.read_text(encoding="utf-8"))
        held, summed = raw.pop("key"), raw.pop("sum")
        if held == key and summed == _sum(raw):
            groups, ops = tuple(map(_group, raw["groups"])), tuple(map(_op, raw["ops"]))
            return Structure(groups, ops, dict(raw["frozen"]), str(raw["fingerprint"]))
    return None


def _group(plain: Mapping[str, Any]) -> Group:
    kinds: dict[str, Any] = {"slices": Slice, "sizes": Size, "stands": Stand}
    parts = {name: tuple(kind(**part) for part in plain[name]) for name, kind in kinds.items()}
    return Group(**{**_tupled(plain), **parts})


def _op(plain: Mapping[str, Any]) -> Op:
    return Op(**{**_tupled(plain), "tensors": tuple(TensorSpec(**_tupled(t)) for t in plain["tensors"])})


def _tupled(plain: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where values have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}


def _sum(body: Mapping[str, Any]) -> str:
    """Of what is written, and of the fields that this version has for it."""
    known = [[f.name for f in fields(kind)] for kind in (Structure, Group, Slice, Size, Stand, Op, TensorSpec)]
    return hashlib.sha256(json.dumps([known, body], sort_keys=True).encode()).hexdigest()
