"""Old imports led to where the parts live now: what the scripts of ../shared/faults name, as of 2026-11-29.

`install()` is called in their processes, before anything else; assigning to an old module reaches the new ones.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from importlib.machinery import PathFinder
from typing import Any

HOMES = {
    "evaluate": ("evaluator.tiers", "evaluator.settings", "evaluator.prepared", "run.worker_evaluator"),
    "setting": ("run.setting", "run.prepare", "record.folder", "criteria"),
    "calibration": ("database.batches", "database.rows"),
    "job": ("files.job",),
    "precision": ("evaluator.precision",),
    "reference": ("evaluator.dense_reference",),
    "budget": ("allocation.budget",),
    "bootstrap": ("estimates",),
}
NAMES = {"setting": {"load_criterion": "build_criterion"}}
"""What is called otherwise now, by old module: old name, new name."""


def install() -> None:
    sys.meta_path.insert(0, _Finder())


class _Moved(types.ModuleType):
    """A module whose parts live elsewhere: a value set here is set wherever it is in use."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name.startswith("__") or self.__name__.removeprefix("autoprune.") not in HOMES:
            return
        for module in [m for n, m in sys.modules.items() if n.startswith("autoprune.") and not isinstance(m, _Moved)]:
            if name in vars(module):
                setattr(module, name, value)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        if name.removeprefix("autoprune.") in HOMES and name.startswith("autoprune."):
            return PathFinder.find_spec(name, path) or importlib.machinery.ModuleSpec(name, self)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Moved(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        old = module.__name__.removeprefix("autoprune.")
        for home in reversed(HOMES[old]):
            found = vars(importlib.import_module("autoprune." + home))
            vars(module).update({name: value for name, value in found.items() if not name.startswith("__")})
        for name, new in NAMES.get(old, {}).items():
            vars(module)[name] = vars(module)[new]
        if old == "bootstrap":
            vars(module)["paired"] = _paired


def _paired(differences: Any, rng: Any, resamples: int) -> tuple[float, float, float]:
    """The interval that a verdict is made with today draws nothing."""
    from autoprune.estimates import crossed

    return crossed(differences)
