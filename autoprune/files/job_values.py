"""The values that keys of a job file take."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Literal

from pydantic import ByteSize, Field, PlainValidator, TypeAdapter, ValidationError

Count = Annotated[int, Field(strict=True, ge=1)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0, le=10.0)]
Weight = Annotated[float, Field(ge=0.0, le=1.0)]
Sparsity = Annotated[float, Field(ge=0.0, lt=1.0)]


def _whole(least: int) -> Callable[[object], object]:
    """Takes auto or a whole number."""

    def check(given: object) -> object:
        if given == "auto" or (isinstance(given, int) and not isinstance(given, bool) and given >= least):
            return given
        raise ValueError(f"must be auto or a whole number from {least}, not {given!r}")

    return check


def _bytes(given: object) -> object:
    with suppress(ValidationError):
        if given == "auto" or (size := int(TypeAdapter(ByteSize).validate_python(given))) > 0:
            return given if given == "auto" else size
    raise ValueError(f"must be auto or a size such as 4GB, not {given!r}")


Step = Annotated[int | Literal["auto"], PlainValidator(_whole(1))]
Widths = Annotated[int | Literal["auto"], PlainValidator(_whole(0))]
Bytes = Annotated[int | Literal["auto"], PlainValidator(_bytes)]
