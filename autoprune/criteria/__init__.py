"""Criteria, one file each: what an atom or a weight is worth. Here is how one is built, and what identifies it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from autoprune import plugins
from autoprune.errors import InputError
from autoprune.matrices import sparse_pattern
from autoprune.protocols import Criterion

Named = str | Mapping[str, Any]
"""A criterion as a job or a policy file names it: its name, or {"name": ..., "options": {...}}."""


def build_criterion(given: Named, granularity: Sequence[str] = ()) -> Criterion:
    """The criterion that `given` names, a file of this folder or a user's "module:Class", with its options.

    Raises:
        InputError: no such criterion, it is no class, it does not take these options or their values, or it scores no
            single weights where a space of this `granularity` has some.
    """
    name, options = _parts(given)
    criterion: Criterion = plugins.build("criteria", name, options, "criterion.options")
    if sparse_pattern(granularity) is not None:
        from autoprune.database.scored import check_weights  # torch, which who only reads a job does without

        check_weights(criterion)
    return criterion


def criterion_identity(given: Named) -> str:
    """What scores depend on beside model and data: name, options and source, so that no stale file is taken."""
    name, options = _parts(given)
    return json.dumps([name, options, plugins.source_digest(plugins.load("criteria", name))], sort_keys=True)


def _parts(given: Named) -> tuple[str, dict[str, Any]]:
    if isinstance(given, str):
        return given, {}
    if not isinstance(given, Mapping):
        own = f" (as {given.__module__}:{given.__qualname__})" if isinstance(given, type) else ""
        said = "a criterion is named: 'obs', 'module:Class' or {'name': ..., 'options': {...}}"
        raise InputError(f"{said}, not {given!r:.80}{own}")
    return str(given.get("name", "")), dict(given.get("options") or {})
