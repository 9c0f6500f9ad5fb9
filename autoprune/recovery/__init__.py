"""Recoveries, one file each: how a pruned model is trained back. Here is how one is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoprune import plugins
from autoprune.errors import InputError
from autoprune.protocols import Recovery


def build_recovery(schedule: str, options: Mapping[str, Any]) -> Recovery:
    """The recovery called `schedule`, a file of this folder or a user's "module:Class", with its options.

    Raises:
        InputError: no such recovery, it is no class, or it does not take these options or their values.
    """
    made = plugins.load("recovery", schedule)
    if not isinstance(made, type) or not hasattr(made, "__call__"):  # noqa: B004  # of its instances
        raise InputError(f"recovery {schedule!r} must be a class whose instances can be called, not {made!r:.80}")
    plugins.check_options(made, options, 0, "recovery.options")
    try:
        recovery: Recovery = made(**options)
    except (TypeError, ValueError) as error:
        if not options:  # then nothing that the user wrote is wrong
            raise
        raise InputError(f"recovery.options: {schedule} refuses {dict(options)}: {error}") from error
    return recovery
