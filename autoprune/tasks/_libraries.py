"""What to say where a library of models is not there, or its compiled part does not fit the torch beside it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from importlib import metadata

import torch

from autoprune.errors import InputError, one_line

IMAGES = "pip install 'autoprune[timm]' brings timm, torchvision and Pillow"
TEXTS = "pip install 'autoprune[transformers]' brings it"


def unusable(what: str, error: Exception, brings: str = IMAGES) -> InputError:
    """`error`, which an import raised that `what` needs, as one line that names what to install."""
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "?").partition(".")[0]
        said = f"{what} needs the package {missing!r}, which is not installed"
        return InputError(f"{said}; {brings}")
    pair = _pair()
    if pair is None:
        return InputError(f"{what} needs a library that cannot be imported: {one_line(error)}")
    said = f"{what}: the installed torchvision does not fit torch {torch.__version__} ({one_line(error, 120)})"
    return InputError(f"{said}; install the pair: pip install {pair}")


def _pair() -> str | None:
    """The installed torchvision with the torch that it was built for, as arguments of pip."""
    try:
        version, needs = metadata.version("torchvision"), metadata.requires("torchvision")
    except metadata.PackageNotFoundError:
        return None
    found = (re.fullmatch(r"torch\s*\(?([=<>!~][^;)]*)\)?", need.strip()) for need in needs or ())
    bound = next((match.group(1).strip() for match in found if match), "")
    return f"'torch{bound}' torchvision=={version}"


def nearest(name: str, known: Sequence[str]) -> str:
    """The few of many `known` names that `name` may have meant, and how many there are."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"nearest: {', '.join(near)}" if near else f"it has {len(known)}, such as {', '.join(known[:3])}"
