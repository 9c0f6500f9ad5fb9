"""Recoveries, one file each: how a pruned model is trained back. Here is how one is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoprune import plugins
from autoprune.protocols import Recovery


def build_recovery(schedule: str, options: Mapping[str, Any]) -> Recovery:
    """The recovery called `schedule`, a file of this folder or a user's "module:Class", with its options.

    Raises:
        InputError: no such recovery, it is no class, or it does not take these options or their values.
    """
    recovery: Recovery = plugins.build("recovery", schedule, options, "recovery.options")
    return recovery
