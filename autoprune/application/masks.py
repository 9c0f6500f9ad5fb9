"""Masked weights on disk: which of their numbers stay, as packed bits in a file of its own, and the values alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoprune.database.zeros import MEANT, masked
from autoprune.errors import InputError
from autoprune.front import Point
from autoprune.tasks._weights import read_tensors
from autoprune.tracing.masks import packed, unpacked

MASKS = "masks.safetensors"
KEY = "masks"
"""Under which both files hold their metadata, as JSON: safetensors keeps several keys in no fixed order."""
FORMAT = "autoprune/masks/1"
BYTE = 8


@dataclass(frozen=True)
class Split:
    """Tensors with masked weights as values [nonzeros], and for each of these its bits, uint8, and its shape."""

    tensors: dict[str, Tensor]
    bits: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]


def split(tensors: Mapping[str, Tensor], parameters: Iterable[str], point: Point) -> Split:
    """The `parameters` among `tensors` that are masked as bits and values, where these take fewer bytes.

    Such are those whose zeros are a mask by their number, and those in which the policy of `point` wants zeros.
    """
    widths = point.policy.as_dict()
    wanted = {n for g in point.base.groups if g.kind == "weight" and widths[g.name] < g.width for n in g.matrices}
    found = Split(dict(tensors), {}, {})
    for name in parameters:
        whole = tensors.get(name)
        if whole is None or not (name in wanted or _is_masked(whole)):
            continue
        mask = whole != 0
        bits, values = packed(mask), whole[mask]
        if bits.nbytes + values.nbytes < whole.nbytes:
            found.tensors[name], found.bits[name], found.shapes[name] = values, bits, tuple(whole.shape)
    return found


def _is_masked(whole: Tensor) -> bool:
    """By its zeros alone; of 8-bit integers without those that rounding makes, half as many as it makes ones."""
    if not masked(whole):
        return False
    rounded = 0 if whole.is_floating_point() else int((whole.abs() == 1).sum()) // 2
    return int((whole == 0).sum()) - rounded >= MEANT * whole.numel()


def write_split(found: Split, point: Point, path: Path) -> None:
    """Write the tensors to `path`, and the masks beside it, where there are any: without them all is as it always was.

    The weights' file knows the digest of its masks, and the masks know their policy.
    """
    values = {name: tensor.contiguous().clone() for name, tensor in found.tensors.items()}
    if not found.bits:
        save_file(values, path)
        return
    told = {"format": FORMAT, "policy": _policy(point), "shapes": found.shapes}
    save_file(found.bits, path.with_name(MASKS), {KEY: json.dumps(told)})
    save_file(values, path, {KEY: _digest(found.bits, found.shapes)})


def read_whole(path: Path, point: Point) -> dict[str, Tensor]:
    """The tensors of a file of `write_split`, masked weights in their shapes again.

    Raises:
        InputError: a file is missing or damaged, or the masks are those of another policy or of other weights.
    """
    tensors, digest, place = read_tensors(path), _metadata(path), path.with_name(MASKS)
    if digest is None:
        if place.exists():
            raise InputError(f"{place} belongs to other weights: {path.name} beside it has none that are masked")
        return tensors
    if not place.is_file():
        raise InputError(f"no {place}: {path.name} holds values without zeros, and which they are stands there")
    bits, shapes = read_tensors(place), _shapes(place, point)
    if bits.keys() != shapes.keys():
        raise InputError(f"{place} is damaged: it has masks and shapes of different weights")
    for name, mask in _masks(place, bits, shapes, tensors, path):
        whole = torch.zeros(mask.shape, dtype=tensors[name].dtype)
        whole[mask] = tensors[name]
        tensors[name] = whole
    if digest != _digest(bits, shapes):
        raise InputError(f"{place} belongs to other weights: {path.name} was written with other masks")
    return tensors


def _masks(
    place: Path,
    bits: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    path: Path,
) -> Iterator[tuple[str, Tensor]]:
    """(name, mask) of every weight; InputError where bits, shape and values do not go together."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise InputError(f"{place} has a mask of {name}, and {path.name} has no such weight")
        count = -(-prod(shape) // BYTE)
        if bits[name].dtype != torch.uint8 or bits[name].shape != (count,):
            said = f"{str(bits[name].dtype).removeprefix('torch.')} {list(bits[name].shape)}"
            raise InputError(
                f"{place}: the mask of {name} is {said}, and its shape {list(shape)} takes uint8 [{count}]"
            )
        mask = unpacked(bits[name], shape)
        ones, values = int(mask.sum()), list(tensors[name].shape)
        if values != [ones]:
            raise InputError(f"{place}: the mask of {name} has {ones} ones, and {path.name} has {values} values for it")
        yield name, mask


def _shapes(place: Path, point: Point) -> dict[str, tuple[int, ...]]:
    """The shapes of all masks; InputError where the file is none of masks, or of another policy."""
    try:
        told: Any = json.loads(_metadata(place) or "")
        shapes = {str(name): tuple(int(side) for side in shape) for name, shape in told["shapes"].items()}
        policy, form = str(told["policy"]), str(told["format"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{place} is no file of masks: its metadata do not say the shapes of its weights") from error
    if form != FORMAT:
        raise InputError(f"{place} has the format {form!r}, and this version of autoprune reads {FORMAT!r}")
    if policy != _policy(point):
        raise InputError(f"{place} belongs to another policy than point {point.id} of the policy.json beside it")
    return shapes


def _metadata(path: Path) -> str | None:
    """What a safetensors file says under our key."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(KEY)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from error


def _policy(point: Point) -> str:
    """What tells the policy of a point from others: widths, and what it says of its masks."""
    told = [point.policy.widths, sorted(dict(getattr(point, "masks", {})).items())]
    return f"sha256:{hashlib.sha256(json.dumps(told).encode()).hexdigest()}"


def _digest(bits: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What tells these masks from others."""
    found = hashlib.sha256()
    for name in sorted(bits):
        found.update(json.dumps([name, shapes[name]]).encode())
        found.update(bits[name].numpy().tobytes())
    return f"sha256:{found.hexdigest()}"
