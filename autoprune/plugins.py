"""Names and loading of plug-ins: a file in its folder is its own registration; `module:Class` names a user's own."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from autoprune.errors import InputError, did_you_mean

Folder = Literal[
    "criteria",
    "costs",
    "samplers",
    "strategies",
    "tasks",
    "executors",
    "losses",
    "exports",
    "runtimes",
    "recovery",
]
FOLDERS: tuple[Folder, ...] = get_args(Folder)
SINGULAR = {
    "criteria": "criterion",
    "strategies": "strategy",
    "losses": "loss",
    "exports": "export format",
    "recovery": "recovery",
}
OPTUNA_FILE = "optuna_bridge"


def names(folder: Folder) -> tuple[str, ...]:
    """Names of the plug-ins in `folder`; imports nothing. A trailing underscore of the file is not part of the name."""
    found = {p.stem.rstrip("_") for p in (Path(__file__).parent / folder).glob("*.py") if not p.stem.startswith("_")}
    if folder == "samplers":
        found = (found - {OPTUNA_FILE}) | set(OPTUNA_NAMES)
    return tuple(sorted(found))


SHIPPED = {
    "criteria": ("bn_scale", "l1_norm", "l2_norm", "obs", "random", "taylor"),
    "costs": ("bytes", "latency", "macs", "params"),
    "losses": ("bernoulli_kl", "cosine", "kl", "mse"),
}
"""What records of evaluations know by its name alone; any other file is told by its source."""


def is_users(folder: Folder, name: str) -> bool:
    """Whether a plug-in may change under its name: "module:attribute", or a file that somebody put into the folder."""
    return name not in SHIPPED.get(folder, ())


OPTUNA_NAMES = ("random", "tpe", "nsga2", "nsga3", "gp", "cmaes", "qmc")
"""Samplers that live together in samplers/optuna_bridge.py, the exception to one file a name."""


def load(folder: Folder, name: str) -> Any:
    """The class or function called `name` in `folder`, or the object of a user's "module:attribute".

    Raises:
        InputError: no such name (the nearest is named), or the user's module or attribute cannot be imported.
    """
    if ":" in name:
        return load_object(name)
    if name not in names(folder):
        what = SINGULAR.get(folder, folder.removesuffix("s"))
        raise InputError(f"unknown {what} {name!r}; {did_you_mean(name, names(folder))}, or 'module:attribute'")
    if folder == "samplers" and name in OPTUNA_NAMES:
        return importlib.import_module(f"autoprune.samplers.{OPTUNA_FILE}").SAMPLERS[name]
    stem = name if (Path(__file__).parent / folder / f"{name}.py").exists() else f"{name}_"
    module = importlib.import_module(f"autoprune.{folder}.{stem}")
    wanted = name.replace("_", "").lower()
    for attribute, value in vars(module).items():
        if attribute.replace("_", "").lower() == wanted and getattr(value, "__module__", "") == module.__name__:
            return value
    raise InputError(f"{module.__name__} holds no class or function for the name {name!r}")


def check_options(make: Callable[..., Any], options: Mapping[str, Any], given: int, where: str) -> None:
    """Raise InputError where `make` does not take one of `options`; its first `given` parameters are ours.

    `where` is the section of the job that the options stand in.
    """
    parameters = list(inspect.signature(make).parameters.values())[given:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    allowed = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for option in options:
        if option not in allowed:
            raise InputError(f"{where}: unknown option {option!r}; {did_you_mean(option, allowed)}")


def path_parameters(make: Callable[..., Any]) -> frozenset[str]:
    """Names of the parameters that `make` annotates as a Path: what a job gives for them is relative to its file."""
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):
        return frozenset()
    return frozenset(p.name for p in parameters if "Path" in str(p.annotation).replace("pathlib.", ""))


def with_paths(make: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with a Path where `make` asks for one."""
    paths = path_parameters(make)
    return {name: Path(v) if name in paths and isinstance(v, str) else v for name, v in options.items()}


def build(folder: Folder, name: str, options: Mapping[str, Any], where: str) -> Any:
    """An instance, which can be called, of the class called `name` in `folder`, or of a user's "module:Class".

    `where` is the section of the job that the options stand in.

    Raises:
        InputError: no such plug-in, it is no class, or it does not take these options or their values.
    """
    made = load(folder, name)
    if not isinstance(made, type) or not hasattr(made, "__call__"):  # noqa: B004  # of its instances
        what = SINGULAR.get(folder, folder.removesuffix("s"))
        raise InputError(f"{what} {name!r} must be a class whose instances can be called, not {made!r:.80}")
    check_options(made, options, 0, where)
    try:
        return made(**with_paths(made, options))
    except (TypeError, ValueError) as error:
        if not options:  # then nothing that the user wrote is wrong
            raise
        raise InputError(f"{where}: {name} refuses {dict(options)}: {error}") from error


def source_digest(plugin: Any) -> str:
    """12 hex digits of the source that `plugin` was written in, helpers of its file included."""
    try:
        source = inspect.getsource(inspect.getmodule(plugin) or plugin)
    except (OSError, TypeError):  # made at runtime: its name is all there is
        source = getattr(plugin, "__qualname__", repr(type(plugin)))
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def load_object(path: str) -> Any:
    """The object at "module:attribute"; InputError in one line where it cannot be had."""
    module_name, _, attribute = path.partition(":")
    try:
        value: Any = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        raise InputError(f"cannot import {module_name!r} of {path!r}: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [n for n, v in inspect.getmembers(value) if callable(v) and not n.startswith("_")]
            raise InputError(f"module {module_name!r} has no {part!r}; {did_you_mean(part, public[:30])}")
        value = getattr(value, part)
    return value
