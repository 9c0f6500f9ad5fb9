"""The section `latency` of a job file."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from autoprune.files.job_parts import check_plugin
from autoprune.files.job_values import Count
from autoprune.files.part import Part


class LatencyPart(Part):
    """How latency is measured: on which runtime, for how many samples at a time, on how many whole models and threads.

    How many threads there can be is the machine's to say, where it is measured.
    """

    runtime: str = "auto"
    batch_size: Count = 1
    threads: Count = 1
    models: Annotated[int, Field(strict=True, ge=20)] = 24

    @model_validator(mode="after")
    def _known_runtime(self) -> LatencyPart:
        check_plugin("runtimes", self.runtime, "auto")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """One thread is not written: the hash of a job that names none stays what it was before there was the key."""
        written: dict[str, Any] = plain(self)
        return {key: value for key, value in written.items() if key != "threads" or value != 1}
