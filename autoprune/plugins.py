"""Names and loading of plug-ins: a file in its folder is its own registration; `module:Class` names a user's own."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from autoprune.errors import AutopruneError, InputError, PluginError, did_you_mean, one_line

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
    "families",
    "deploy",
]
FOLDERS: tuple[Folder, ...] = get_args(Folder)
SINGULAR = {
    "criteria": "criterion",
    "strategies": "strategy",
    "losses": "loss",
    "exports": "export format",
    "recovery": "recovery",
    "families": "family",
    "deploy": "container",
}
WANTED: Mapping[Folder, str] = {
    "criteria": "a class C(**options) whose instances map (model, groups, task) to {group: scores [width]}, all "
    "finite, and leave the model as it is",
    "costs": "a class C(structure) with dense and monotone, whose instances map widths [..., groups] to ratios "
    "[...] that are numbers from 0 on and 1 at the dense widths",
    "samplers": "a class S(problem, rng, **options) with ask() -> Ask, its widths on the grids, and tell(evaluation)",
    "strategies": "a function (problem, target) -> Policy, its widths on the grids, whose cost is at most target",
    "tasks": "an object with build, example_inputs, split, outputs, loss, metrics and directions",
    "executors": "a class E(make_evaluator, workers, timeout_s, retries, **options) with slots, submit, "
    "next_done, cancel, close, workers and retried",
    "losses": "a function (outputs, dense_outputs, *, classes) -> Tensor [samples]",
    "exports": "a class without arguments that has a suffix and whose instances are called as (model, inputs, path)",
    "runtimes": "a function (model, inputs, threads) -> callable, or a class without arguments of such",
    "recovery": "a class R(**options) whose instances map (model, dense, task, steps, seed) to an iterator of "
    "Progress, training the model in place and leaving it in eval mode between steps",
    "deploy": "a class without arguments that has restrict(structure) -> Structure",
    "families": "a class without arguments that has traced and parts(name, module), which gives Heads and Neurons",
}
"""What a protocol wants of a plug-in, in the words that follow "it must be" in an error."""
OPTUNA_FILE = "optuna_bridge"


def names(folder: Folder) -> tuple[str, ...]:
    """Names of the plug-ins in `folder`; imports nothing. A trailing underscore of the file is not part of the name.

    Containers are called with hyphens.
    """
    found = {p.stem.rstrip("_") for p in (Path(__file__).parent / folder).glob("*.py") if not p.stem.startswith("_")}
    if folder == "deploy":
        found = {name.replace("_", "-") for name in found}
    if folder == "samplers":
        found = (found - {OPTUNA_FILE}) | set(OPTUNA_NAMES)
    return tuple(sorted(found))


SHIPPED = {
    "criteria": (
        *("bn_scale", "fisher", "fpgm", "grasp", "l1_norm", "l2_norm", "movement"),
        *("obs", "random", "snip", "synflow", "taylor", "wanda"),
    ),
    "costs": ("bytes", "kv_bytes", "latency", "macs", "params"),
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
        hint = did_you_mean(name, names(folder))
        raise InputError(f"unknown {one_of(folder)} {name!r}; {hint}, or 'module:attribute'")
    if folder == "samplers" and name in OPTUNA_NAMES:
        return importlib.import_module(f"autoprune.samplers.{OPTUNA_FILE}").SAMPLERS[name]
    file = name.replace("-", "_")
    stem = file if (Path(__file__).parent / folder / f"{file}.py").exists() else f"{file}_"
    module = importlib.import_module(f"autoprune.{folder}.{stem}")
    wanted = file.replace("_", "").lower()
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
        raise InputError(f"{one_of(folder)} {name!r} must be a class whose instances can be called, not {made!r:.80}")
    check_options(made, options, 0, where)
    about_options = (TypeError, ValueError) if options else ()  # without any, nothing that the user wrote is wrong
    try:
        with before_work(), calling(folder, name, spared=(InputError, *about_options)):
            return made(**with_paths(made, options))
    except about_options as error:
        raise InputError(f"{where}: {name} refuses {dict(options)}: {error}") from error


def one_of(folder: Folder) -> str:
    """What a plug-in of `folder` is called."""
    return SINGULAR.get(folder, folder.removesuffix("s"))


def broken(folder: Folder, name: str, did: str) -> PluginError:
    """What the plug-in called `name` in the job did, and what its protocol wants, in one line."""
    return PluginError(f"{one_of(folder)} {name} {did}; it must be {WANTED[folder]} (docs/extending.md)")


@contextmanager
def calling(
    folder: Folder, name: str, when: str = "while it is built", spared: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Where a plug-in's own code runs: whatever it raises becomes one line that names it, but for `spared` errors.

    What autoprune's own parts say of their input stays as it is.

    Raises:
        PluginError: the plug-in called `name` in the job failed, and `when`.
    """
    try:
        yield
    except PluginError:
        raise
    except spared:
        raise
    except AutopruneError as error:
        if ":" not in name:
            raise
        raise broken(folder, name, f"fails {when}: {error}") from error
    except Exception as error:  # a user's code may fail in any way
        raise broken(folder, name, f"fails {when}: {one_line(error)}") from error


def name_of(folder: Folder, made: object) -> str:
    """The name that an instance's class has in a job: its file's, or the user's "module:Class"."""
    kind = type(made)
    stem = kind.__module__.removeprefix(f"autoprune.{folder}.").rstrip("_")
    return stem if stem in names(folder) else f"{kind.__module__}:{kind.__qualname__}"


@contextmanager
def before_work() -> Iterator[None]:
    """What a plug-in does wrong before anything was computed is wrong input."""
    try:
        yield
    except PluginError as error:
        raise InputError(str(error)) from error


def check_has(folder: Folder, name: str, made: object, *members: str) -> None:
    """PluginError unless `made`, what the plug-in called `name` gave, has these members."""
    lacking = [member for member in members if not hasattr(made, member)]
    if lacking:
        raise broken(folder, name, f"gives a {type(made).__name__} without {', '.join(lacking)}")


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
