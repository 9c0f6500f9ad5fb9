"""The form of policy.json (schema autoprune/policy/1): what each of its objects holds, and its JSON Schema."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from autoprune.structure import Gives, Kind, Role

SCHEMA = "autoprune/policy/1"
Number = int | float


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class SliceFile(_Part):
    """One slice; what is left out has its default."""

    tensor: str
    dim: int
    role: Role
    offset: int = 0
    stride: int = 1
    repeat: int = 1
    first: int = 0
    count: int | None = None


class SizeFile(_Part):
    """A whole number in the model's code that counts the atoms; what is left out has its default."""

    attribute: str
    value: int
    index: int | None = None
    each: int = 1


class StandFile(_Part):
    """What stands in a module's place where its block is absent."""

    module: str
    gives: Gives
    results: int = 0


class GroupFile(_Part):
    """One group with the widths that the search allowed; `order` ranks its atoms, the one kept longest first."""

    kind: Kind
    width: int
    grid: tuple[int, ...]
    order: tuple[int, ...] | None = None
    slices: tuple[SliceFile, ...]
    sizes: tuple[SizeFile, ...] = ()
    stands: tuple[StandFile, ...] = ()
    matrices: tuple[str, ...] = ()
    pattern: str = ""


class FingerprintFile(_Part):
    """What identifies the dense model; hashes of different versions do not compare, files of 0.1.0 name none."""

    version: int = 1
    structure: str
    weights: str


class BaseFile(_Part):
    """The dense model that the points belong to; costs are absolute, MACs a sample."""

    fingerprint: FingerprintFile
    model: str
    inputs: tuple[dict[str, Any], ...]
    costs: dict[str, Number]
    metrics: dict[str, dict[str, Number]]
    directions: dict[str, str] = Field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    task: dict[str, Any] = Field(default_factory=dict)


class LossFile(_Part):
    """A loss under its name, with the 95 % interval over the samples where they are known one by one."""

    name: str
    loss: Number
    low: Number | None = None
    high: Number | None = None


class MaskFile(_Part):
    """Which numbers of a weight stay, as the hash of the packed bits of all that the structured groups leave of it."""

    mask: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")


class PointFile(_Part):
    """One point; widths and kept atoms in original coordinates.

    `keep` names the groups that do not keep the first of their order, and those of kind `weight` that have zeros. Files
    of 0.1.0 have no `losses`: there they stand among the metrics.
    """

    id: str
    widths: dict[str, int]
    keep: dict[str, tuple[int, ...] | MaskFile] = Field(default_factory=dict)
    costs: dict[str, Number | dict[str, Number]]
    losses: dict[str, LossFile] = Field(default_factory=dict)
    metrics: dict[str, dict[str, Number]]
    finetuned: dict[str, Any] = Field(default_factory=dict)
    trial: int


class FrontFile(_Part):
    """The whole file."""

    format: str = Field(alias="schema", pattern=r"^autoprune/policy/1(\.[0-9]+)?$")
    kind: Literal["front"]
    base: BaseFile
    space: dict[str, Any]
    data: str
    groups: dict[str, GroupFile]
    points: tuple[PointFile, ...]
    measured_on: dict[str, Any]
    provenance: dict[str, Any]


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the file; policy.schema.json in this package is this, and a test holds them equal."""
    schema = FrontFile.model_json_schema(by_alias=True)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA}
    return {**head, **schema, "title": "autoprune policy file"}
