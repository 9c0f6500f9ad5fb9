"""The extras of autoprune, and what of each is installed: read from the metadata of packages, importing none."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from autoprune.errors import one_line

NAME = "autoprune"
PROJECT = Path(__file__).parents[2] / "pyproject.toml"
"""Beside the package in a checkout, whose metadata may not be installed."""


def version_of(package: str) -> str | None:
    """The version that is installed of a distribution; None where there is none, or none that can be told."""
    try:
        found: str | None = metadata.version(package)  # None where the metadata have lost it
    except Exception:  # whatever is wrong with its files, it is not there in any use
        return None
    return found


def extras() -> list[dict[str, Any]]:
    """Of each extra its name, what of it is lacking, and the command that adds it; empty where nothing says which.

    Installed means that all its packages are there in versions that it takes, not that they work.
    """
    found = []
    for extra, requirements in declared().items():
        try:
            lacking = sorted({name for text in requirements for name in _lacking(text)})
        except Exception as error:  # metadata of others may be damaged in many ways
            lacking = [f"cannot be told: {one_line(error)}"]
        add = f"pip install '{NAME}[{extra}]'"
        found.append({"name": extra, "installed": not lacking, "lacking": lacking, "add": add})
    return found


def declared() -> Mapping[str, tuple[str, ...]]:
    """The requirements of each extra, from the package's metadata, or from the checkout's project file."""
    try:
        own = metadata.distribution(NAME)
        names = own.metadata.get_all("Provides-Extra") or []
        return {name: tuple(_of_extra(own, name)) for name in names}
    except Exception:  # not installed, or damaged: the checkout, if it is one, says the same
        return _of_project()


def _of_project() -> Mapping[str, tuple[str, ...]]:
    try:
        project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
        return {name: tuple(texts) for name, texts in project["optional-dependencies"].items()}
    except (OSError, ValueError, KeyError):
        return {}


def _of_extra(own: metadata.Distribution, extra: str) -> Iterator[str]:
    """The requirements that an extra of a distribution adds to those that it has anyway."""
    from packaging.requirements import Requirement

    for text in own.requires or []:
        marker = Requirement(text).marker
        if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            yield text


def _lacking(text: str, seen: frozenset[tuple[str, str]] = frozenset()) -> Iterator[str]:
    """The packages of a requirement that are not there, or in no version that it takes, with those of its extras."""
    from packaging.requirements import Requirement

    wanted = Requirement(text)
    if wanted.name == NAME:  # an extra of ours that is made of others
        inner = [part for extra in wanted.extras for part in declared().get(extra, ())]
    else:
        version = version_of(wanted.name)
        if version is None or not wanted.specifier.contains(version, prereleases=True):
            yield f"{wanted.name}{wanted.specifier}"
            return
        inner = [part for extra in wanted.extras for part in _of_extra(metadata.distribution(wanted.name), extra)]
    for part in inner:
        if (text, part) not in seen:
            yield from _lacking(part, seen | {(text, part)})
