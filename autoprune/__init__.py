"""autoprune: AutoML search for neural-network pruning policies.

The verbs are `analyze`, `search`, `pareto_front`, `apply` and `compare`; nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from autoprune.version import __version__ as __version__

if TYPE_CHECKING:
    from autoprune.application.apply import apply as apply
    from autoprune.application.loader import load as load
    from autoprune.application.loader import load_applied as load_applied
    from autoprune.application.loader import save as save
    from autoprune.application.optimizer_state import transfer_optimizer as transfer_optimizer
    from autoprune.application.transfer import transfer as transfer
    from autoprune.comparison.comparison import compare as compare
    from autoprune.families import analyze as analyze
    from autoprune.files.job import Job as Job
    from autoprune.files.policy_file import load_front as load_front
    from autoprune.pareto import pareto_front as pareto_front
    from autoprune.policy import Policy as Policy
    from autoprune.run.run import search as search
    from autoprune.structure import Structure as Structure
    from autoprune.tasks._wrap import task as task

_HOMES = {
    "Job": "files.job",
    "Policy": "policy",
    "Structure": "structure",
    "analyze": "families",
    "apply": "application.apply",
    "compare": "comparison.comparison",
    "load": "application.loader",
    "load_applied": "application.loader",
    "load_front": "files.policy_file",
    "pareto_front": "pareto",
    "save": "application.loader",
    "search": "run.run",
    "task": "tasks._wrap",
    "transfer": "application.transfer",
    "transfer_optimizer": "application.optimizer_state",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autoprune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"autoprune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
