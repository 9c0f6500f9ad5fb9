"""What every section of a job file is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

TAG = "~"
"""Marks the branch of a union in pydantic's error locations, so that messages can leave it out."""


class Part(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)
