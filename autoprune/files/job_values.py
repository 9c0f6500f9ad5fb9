"""The values that keys of a job file take."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Literal

from pydantic import ByteSize, Field, PlainValidator, TypeAdapter, ValidationError

Count = Annotated[int, Field(strict=True, ge=1)]
GRANULARITIES = ("channel",)
LATER = ("auto", "head", "kv_group", "neuron", "block", "bits", "weight")
"""Kinds that policy files may know and this version does not search."""

Natural = Annotated[int, Field(strict=True, ge=0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0, le=10.0)]
Weight = Annotated[float, Field(ge=0.0, le=1.0)]
Sparsity = Annotated[float, Field(ge=0.0, lt=1.0)]


def _step(given: object) -> object:
    if given == "auto" or (isinstance(given, int) and not isinstance(given, bool) and given >= 1):
        return given
    raise ValueError(f"must be auto or a whole number from 1, not {given!r}")


def _bytes(given: object) -> object:
    with suppress(ValidationError):
        if given == "auto" or (size := int(TypeAdapter(ByteSize).validate_python(given))) > 0:
            return given if given == "auto" else size
    raise ValueError(f"must be auto or a size such as 4GB, not {given!r}")


Step = Annotated[int | Literal["auto"], PlainValidator(_step)]
Bytes = Annotated[int | Literal["auto"], PlainValidator(_bytes)]
